"""Pages of many kinds of runs in a real browser: none logs an error or a warning, none shows what is no number."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatsae.page.data import HEADLINE, NO_SINKS, Wanted, find_runs, page_data
from chatsae.page.write import page as html_page
from chatsae.runs import Run
from feature_samples import TOKEN, plain_model
from page_browser import NEEDS_BROWSER, Opened
from page_samples import hostile_run, steer

pytestmark = NEEDS_BROWSER

SAE = "L1-1x-standard"
NO_NUMBER = re.compile(r"NaN|undefined|Infinity|\[object")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    made = hostile_run(folder / "run", plain_model(folder / "model"))
    steer(made)
    return made


@pytest.fixture(scope="module")
def data(run: Path) -> dict[str, Any]:
    return page_data(find_runs([run]), Wanted(features=4, contexts=6))


def look(browser, data: dict[str, Any], folder: Path, *addresses: str) -> list[str]:
    """The texts of a page at some addresses, and of its charts as they are drawn; nothing is logged."""
    file, found = folder / "report.html", []
    file.write_text(html_page(data), encoding="utf-8")
    for address in addresses or ("", f"#{SAE}", f"#{SAE}/{TOKEN}"):
        opened = Opened(browser, file, address)
        opened.page.locator("details").evaluate_all("all => all.forEach(one => (one.open = true))")
        opened.page.screenshot(path=folder / f"page{len(found)}.png", full_page=True)
        found.append(opened.page.locator("main, body").first.inner_text())
        drawn = opened.page.locator("svg").evaluate_all("all => all.map(one => one.outerHTML).join()")
        opened.close()
        assert not NO_NUMBER.search(drawn), NO_NUMBER.findall(drawn)
        assert not NO_NUMBER.search(found[-1]), NO_NUMBER.findall(found[-1])
    return found


PLAIN = {"mse": 1.0, "sparsity": 2.0, "l0": 5.0, "dead_fraction": 0.5, "sparse_step": False}
ZERO = dict.fromkeys(PLAIN, 0.0) | {"sparse_step": False}
METRICS: dict[str, list[dict[str, Any]]] = {
    "plain step": [PLAIN, PLAIN | {"mse": 0.5}],
    "fast step": [PLAIN | {"sparse_step": i > 1} for i in range(5)],
    "sparse from the first": [PLAIN | {"sparse_step": True}, PLAIN | {"sparse_step": True}],
    "one point": [PLAIN],
    "no point": [],
    "not finite": [PLAIN | {"mse": math.nan, "l0": math.inf}, PLAIN | {"mse": math.nan, "l0": 3.0}],
    "all zero": [ZERO, ZERO],
    "zero among others": [ZERO, PLAIN, PLAIN | {"gsnr": {"value": 1.0}}],
    "below zero": [PLAIN | {"gsnr": -1.0}, PLAIN | {"gsnr": -2.0}],
}


@pytest.mark.parametrize("kind", METRICS)
def test_the_training_of_any_run_is_drawn(browser, data, run: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with_metrics = Run.read(tmp_path / "run")
    for step, record in enumerate(METRICS[kind], 1):
        with_metrics.log({"step": step, "tokens": 100 * step, "saes": {SAE: record}})
    curves = page_data([with_metrics], Wanted(features=4, contexts=6, build=False))["runs"][0]["curves"]
    (said,) = look(browser, data | {"runs": [data["runs"][0] | {"curves": curves}]}, tmp_path, "")
    assert "sparse step" not in said  # a switch, not a figure
    assert ("The run has logged no training metrics." in said) == (not METRICS[kind])


def without(sae: dict[str, Any], *names: str) -> None:
    for name in names:
        sae[name] = [] if name == "judges" else None
    for f in sae["features"] or []:
        f["verdicts"] = f["verdicts"] if sae["judges"] else []


def of_zeros(sae: dict[str, Any]) -> None:
    """An SAE that is dead, on a model whose stream is zero."""
    for figure in sae["figures"].values():
        figure.update(value=0.0, interval=[0.0, 0.0])
    sae["sample"].update(points=[[0.0, 0.0, *point[2:]] for point in sae["sample"]["points"]], sink_norm=0.0)
    sae["sample"]["cells"] = [cell | {"mse": 0.0, "l0": 0.0} for cell in sae["sample"]["cells"]]
    sae["firing"].update(l0=[[0, 100]], density=[], dead=sae["firing"]["d_sae"])
    sae["special"]["rows"] = [row | {"features": []} for row in sae["special"]["rows"]]
    for f in sae["features"]:
        zeros = {key: [0.0] * len(f[key]) for key in ("role", "kind", "position", "role_n", "kind_n", "position_n")}
        f.update(zeros | {"density": 0.0, "max": 0.0, "mean": 0.0, "values": [0, []], "top": [], "sampled": []})
    for judge in sae["judges"]:
        judge["summary"].update(n=0, mean=None, mean_interval=None, counts=dict.fromkeys("12345", 0), above_null=None)
        judge["summary"].update(high={"share": None, "interval": None, "n": 0, "of": 0}, above={})


def of_one(sae: dict[str, Any]) -> None:
    """One token, one feature that is always active, one strength."""
    sae["features"], sae["sample"]["points"] = sae["features"][:1], sae["sample"]["points"][:1]
    sae["sample"]["cells"] = sae["sample"]["cells"][:1]
    sae["firing"].update(l0=[[3, 1]], density=[[0, 1]], dead=0, d_sae=1)
    for sweep in sae["steering"]["sweeps"]:
        sweep["strengths"] = sweep["strengths"][:2]
        for curves in sweep["curves"].values():
            curves.update({measure: values[:2] for measure, values in curves.items()})


def not_finite(sae: dict[str, Any]) -> None:
    for figure in list(sae["figures"].values())[::2]:
        figure.update(value=math.nan, interval=[math.nan, math.inf])
    sae["sample"]["points"][0][:2] = [math.inf, math.nan]
    sae["sample"]["cells"][0].update(mse=math.nan, l0=math.nan)
    for f in sae["features"]:
        f.update(mean=math.nan, near=[[1, math.nan]], up=[[0, math.nan]])
        f["with"] = [[1, math.nan, math.nan]]


def steered_both_ways(sae: dict[str, Any]) -> None:
    for sweep in sae["steering"]["sweeps"]:
        for sign, strength in zip((-1, -1, 1, 1), sweep["strengths"], strict=False):
            strength[1] *= sign
        sweep["strengths"].sort(key=lambda strength: strength[1])
        sweep["grades"] = {"judge": "j", "concept": "c", "missing": {"refused: no": 2}, "chosen": None, "curves": {}}
        feature = dict.fromkeys(("from", "to", "rel_from", "rel_to", "from_interval", "to_interval"))
        sweep["windows"] = {"feature": feature | {"open": False}}


KINDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no judge": lambda sae: without(sae, "judges"),
    "no features": lambda sae: without(sae, "features", "firing", "store", "judges"),
    "no sample": lambda sae: without(sae, "sample", "special"),
    "no steering": lambda sae: without(sae, "steering"),
    "no evaluation": lambda sae: without(sae, "figures"),
    "zeros": of_zeros,
    "one of everything": of_one,
    "nothing sampled": lambda sae: sae["firing"].update(l0=[], density=[]),
    "not finite": not_finite,
    "steered both ways": steered_both_ways,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_any_kind_says_nothing_to_the_console(browser, data, tmp_path: Path, kind: str) -> None:
    own = copy.deepcopy(data)
    KINDS[kind](own["saes"][0])
    said = look(browser, own, tmp_path)
    assert "Held-out dialogues" in said[0]


def test_figures_without_sinks_lead_where_there_are_sinks(browser, data, run: Path, tmp_path: Path) -> None:
    assert [one["key"] for one in data["headline"]] == list(HEADLINE)
    for name, factor in (("one", 1.0), ("two", 0.5)):
        shutil.copytree(run, tmp_path / "both" / name)
        file = tmp_path / "both" / name / "report.json"
        report = json.loads(file.read_text())
        report["saes"][SAE] |= {"sink_share": 0.01, "mse_no_sinks": factor, "l0_no_sinks": 7.25}
        report["facts"]["sinks_pass"] = {"1": 10.0}
        report["saes"][SAE]["groups"]["part"]["content"]["mse"] = 0.125 * factor
        file.write_text(json.dumps(report))
    both = page_data(find_runs([tmp_path / "both"]), Wanted(features=4, contexts=6, build=False))
    keys = [one["key"] for one in both["headline"]]
    assert keys[:6] == list(NO_SINKS)
    assert sorted(keys) == sorted(NO_SINKS | HEADLINE)
    (said,) = look(browser, both, tmp_path, "")
    assert said.index("Explained variance without sinks") < said.index("MSE without sinks") < said.index("MSE, all")
    assert "7.25" in said
    assert "0.0625" in said[said.index("MSE by part") :]
    assert "Norm sinks are tokens longer" in said
    assert "norm sinks keep the model's own activation" in said


def test_a_page_of_two_runs_of_which_one_is_bare(browser, data, tmp_path: Path) -> None:
    own = copy.deepcopy(data)
    other = copy.deepcopy(own["saes"][0]) | {"run": 1}
    without(other, "features", "firing", "store", "judges", "sample", "special", "steering", "figures")
    own["saes"].append(other)
    own["runs"].append(own["runs"][0] | {"name": "bare", "path": "bare", "curves": {}, "evaluated": None})
    look(browser, own, tmp_path, "", f"#{SAE}", f"#bare/{SAE}", f"#bare/{SAE}/3")
    json.dumps(own, allow_nan=False)
