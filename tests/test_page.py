"""The data of the page, its size, and that nothing of a data set is markup in it."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.features.records import Context, Feature
from chatsae.features.store import FeatureStore
from chatsae.page.data import Wanted, find_runs, page_data
from chatsae.page.pack import LEVELS, Dialogues, firing_histograms, packed, packed_feature
from chatsae.page.sample import DIALOGUES, TokenSums
from chatsae.page.write import SCRIPTS, page
from chatsae.runs import Run
from feature_samples import FIRST, TOKEN, plain_model
from page_samples import HOSTILE, hostile_run

SAE = "L1-1x-standard"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return hostile_run(folder / "hostile", plain_model(folder / "model"))


@pytest.fixture(scope="module")
def data(run: Path) -> dict:
    return page_data(find_runs([run]), Wanted(features=20, contexts=6))


def unpacked(html: str) -> dict:
    found = re.search(r'id="data">([^<]*)</script>', html)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def expanded(runs: list[int]) -> list[int]:
    return [value for value, n in zip(runs[::2], runs[1::2], strict=True) for _ in range(n)]


def window(data: dict, context: list) -> dict[str, list]:
    """What the page makes of a packed context."""
    number, start, length, _, _, _, acts = context
    dialogue = data["dialogues"][number]
    cut = slice(start - dialogue["start"], start - dialogue["start"] + length)
    levels = [0] * length
    for at, level in zip(accumulate(acts[::2], initial=-1), [0, *acts[1::2]], strict=True):
        if level:
            levels[at] = level
    codes = expanded(dialogue["c"])[cut]
    return {
        "tokens": [data["texts"][i] for i in dialogue["t"][cut]],
        "role": [code // 12 for code in codes],
        "kind": [code // 2 % 6 for code in codes],
        "prefix": [bool(code % 2) for code in codes],
        "turn": expanded(dialogue["u"])[cut],
        "levels": levels,
    }


def test_the_contexts_of_the_page_are_those_of_the_store(run: Path, data: dict) -> None:
    store = FeatureStore.load(run / "features" / SAE)
    seen = 0
    for row in data["saes"][0]["features"]:
        feature = store.feature(row["i"])
        for context, given_ in zip(feature.contexts[:6], row["top"], strict=True):
            shown = window(data, given_)
            for name in ("tokens", "role", "kind", "prefix", "turn"):
                assert shown[name] == list(getattr(context, name)), name
            acts = np.array(shown["levels"]) / LEVELS * feature.max_act
            np.testing.assert_allclose(acts, context.acts, atol=feature.max_act / LEVELS)
            assert given_[3] == context.peak
            seen += 1
    assert seen > 10


tokens = st.lists(
    st.tuples(st.text(max_size=3), st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(-1, 9))
)


@given(tokens.filter(bool), st.data())
def test_any_context_comes_back_as_it_was(rows: list, draw: st.DataObject) -> None:
    texts, roles, kinds, prefix, turns = (tuple(column) for column in zip(*rows, strict=True))
    dialogues, made = Dialogues(), []
    for _ in range(3):  # windows of one dialogue that may overlap, or leave tokens out
        start = draw.draw(st.integers(0, len(rows) - 1))
        cut = slice(start, draw.draw(st.integers(start + 1, len(rows))))
        n = len(texts[cut])
        acts = tuple(draw.draw(st.lists(st.sampled_from([0.0, 0.001, 0.5, 2.0]), min_size=n, max_size=n)))
        own = (texts[cut], acts, roles[cut], kinds[cut], turns[cut], prefix[cut])
        made.append(Context(1, "d", 2.0, None, start, 0, (0,) * n, *own, index=4))
    shown = [packed(context, dialogues.add("split", context), 2.0) for context in made]
    data = json.loads(json.dumps({"dialogues": dialogues.facts(), "texts": list(dialogues.texts)}))
    for context, row in zip(made, shown, strict=True):
        found = window(data, row)
        assert found["tokens"] == list(context.tokens)
        assert (found["role"], found["kind"], found["turn"]) == (
            list(context.role),
            list(context.kind),
            list(context.turn),
        )
        assert [level > 0 for level in found["levels"]] == [act > 0 for act in context.acts]
    assert len(data["dialogues"]) == 1


def test_the_histogram_of_l0_counts_what_fires(run: Path, data: dict) -> None:
    store = FeatureStore.load(run / "features" / SAE)
    firing = data["saes"][0]["firing"]
    counts = np.array(firing["l0"])
    assert firing == firing_histograms(store)
    assert counts[:, 1].sum() == firing["sampled_tokens"] == store.facts["n_tokens"]  # few enough to take all
    assert (counts[:, 0] * counts[:, 1]).sum() == store.columns["n_active"].sum()
    assert sum(n for _, n in firing["density"]) + firing["dead"] == firing["d_sae"] == 128


def test_cells_and_points_are_those_of_a_slow_count(run: Path) -> None:
    from chatsae.features.session import RunFeatures

    session = RunFeatures(run)
    limit = FeatureStore.load(run / "features" / SAE).facts["dialogues_asked"]
    batch = session.tokens(limit)
    batch = batch.select(range(min(DIALOGUES, len(batch))))
    sae, sums = session.saes[SAE], TokenSums(session.saes[SAE])
    slow: dict[tuple[int, int], list[float]] = {}
    for part in session.lm.harvest([batch], token_budget=300):
        sums.add(part.acts[0], part.tokens)
        for x, role, kind in zip(part.acts[0], part.tokens.role.tolist(), part.tokens.kind.tolist(), strict=True):
            slow.setdefault((role, kind), []).append(float((sae(x) - x).detach().pow(2).mean()))
    facts = sums.facts()
    assert {(c["role"], c["kind"]): c["n"] for c in facts["cells"]} == {k: len(v) for k, v in slow.items()}
    for cell in facts["cells"]:
        assert cell["mse"] == pytest.approx(np.mean(slow[cell["role"], cell["kind"]]), rel=1e-3)
    assert facts["n_tokens"] == len(batch.input_ids)


def test_norm_sinks_are_marked() -> None:
    import torch

    from chatsae.batch import TokenBatch
    from chatsae.sae import base
    from feature_samples import D_IN
    from sae_samples import spec

    sums = TokenSums(base.SAE.create(spec(D_IN, factor=1, name="x")))
    x = torch.ones(30, D_IN)
    x[7] *= 11
    none = torch.zeros(30, dtype=torch.uint8)
    ends, order = torch.tensor([0, 30], dtype=torch.int32), torch.arange(30)
    sums.add(x, TokenBatch(("d",), order, ends, order, none, none, none.bool(), none.bool()))
    facts = sums.facts()
    assert facts["n_sinks"] == 1
    assert [p[4] for p in facts["points"]] == [int(i == 7) for i in range(30)]


def test_the_page_holds_the_figures_of_the_report(run: Path, data: dict) -> None:
    row = json.loads((run / "report.json").read_text())["saes"][SAE]
    figures = data["saes"][0]["figures"]
    assert figures["mse"]["value"] == pytest.approx(row["mse"], rel=1e-3)
    assert figures["mse"]["interval"] == pytest.approx(row["intervals"]["mse"], rel=1e-3)
    shown, parts = data["saes"][0]["mse_by_part"], row["groups"]["part"]
    assert {part for part, mse in shown.items() if mse is not None} == set(parts)
    assert {part: shown[part] for part in parts} == pytest.approx({p: parts[p]["mse"] for p in parts}, rel=1e-3)
    assert data["runs"][0]["curves"][SAE]["mse"] == [[100, 1.0], [200, 0.5]]
    assert ["Seed", str(Run.read(run).config.train.seed)] in data["runs"][0]["identity"]
    planted = {f["i"]: f for f in data["saes"][0]["features"]}
    assert planted[TOKEN]["density"] > 0
    assert planted[FIRST]["position"][0] > 0
    assert planted[FIRST]["position"][1:] == [0, 0, 0, 0]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_of_a_data_set_is_markup(data: dict) -> None:
    html = page(data | {"texts": [*data["texts"], *HOSTILE]})
    parser = Tags()
    parser.feed(html)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2  # the data and the program
    assert "img" not in tags
    assert all(text not in html for text in ("window.owned", "שלום", "\x00", "\u202e"))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert unpacked(html)["texts"][-len(HOSTILE) :] == list(HOSTILE)


def test_the_policy_lets_nothing_load(data: dict) -> None:
    import hashlib

    html = page(data)
    policy = next(a["content"] for t, a in _parsed(html) if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert page(data) == html  # equal data, equal bytes


def _parsed(html: str) -> list[tuple[str, dict]]:
    parser = Tags()
    parser.feed(html)
    return parser.found


def test_the_program_is_small_and_never_writes_markup() -> None:
    folder = Path(page.__code__.co_filename).parent
    program = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert len(program.encode()) < 80_000
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp|import\(", program
    )


def colours() -> dict[str, dict[str, tuple[float, ...]]]:
    """The colours of each theme by name, as red, green and blue of 0 to 1."""
    style = Path(page.__code__.co_filename).with_name("page.css").read_text(encoding="utf-8")
    themes = re.findall(r":root(\[data-theme=\"dark\"\])? \{(.*?)\}", style, re.DOTALL)
    found = {}
    for dark, body in themes[:2]:
        given_ = re.findall(r"--(\w[\w-]*): #([0-9a-f]{3,6});", body)
        whole = {name: code if len(code) == 6 else "".join(2 * c for c in code) for name, code in given_}
        found["dark" if dark else "light"] = {
            name: tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, code in whole.items()
        }
    return found


def linear(colour: tuple[float, ...]) -> np.ndarray:
    values = np.array(colour)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* (D65) of linear red, green and blue."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


DICHROMATS = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "none": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_and_runs_are_told_apart_by_the_colour_blind(theme: str) -> None:
    given_ = {name: linear(colour) for name, colour in colours()[theme].items()}
    light = {name: float(rgb @ [0.2126, 0.7152, 0.0722]) + 0.05 for name, rgb in given_.items()}
    for text in ("ink", "soft", "accent", "warn", "s0", "s1", "s2", "s3", "r1", "r3", "r4", "r5"):
        for ground in ("paper", "back") if text in ("ink", "soft", "accent") else ("paper",):
            ratio = max(light[text], light[ground]) / min(light[text], light[ground])
            assert ratio >= 4.5, (text, ground, ratio)  # WCAG 2, AA
    for eyes, matrix in DICHROMATS.items():
        seen = [lab(matrix @ given_[name]) for name in ("s0", "s1", "s2")]
        nearest = min(float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[:i])
        assert nearest > 20, (eyes, nearest)


def test_512_features_with_20_contexts_are_less_than_3_mb() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 6))) for _ in range(8000)]
    length, long = 64, 400
    said = [rng.integers(0, len(words), long) for _ in range(2000)]

    def context(feature: int, rank: int) -> Context:
        number, start = int(rng.integers(len(said))), int(rng.integers(long - length))
        ids = said[number][start : start + length]
        acts = np.where(rng.random(length) < 0.15, rng.random(length) * 9, 0)
        role, turn = [3 + (start + i) // 50 % 2 for i in range(length)], [(start + i) // 50 for i in range(length)]
        texts, none = tuple(words[i] for i in ids), (0,) * length
        per_token = (
            tuple(ids.tolist()),
            texts,
            tuple(acts.tolist()),
            tuple(role),
            none,
            tuple(turn),
            (False,) * length,
        )
        return Context(feature, f"d{number}", 9.0, None if rank < 20 else 0.5, start, 48, *per_token, index=number)

    dialogues, rows = Dialogues(), []
    for i in range(512):
        contexts = tuple(context(i, rank) for rank in range(25))
        tokens = tuple((words[k], 0.1) for k in rng.integers(0, len(words), 10))
        bins = tuple(rng.integers(0, 5000, 64).tolist())
        near = tuple((int(k), 0.5) for k in rng.integers(0, 65536, 10))
        shares = tuple((k, 0.25, 0.125) for k, _ in near)
        parts = {"role_counts": bins[:6], "kind_counts": bins[:6], "position_counts": bins[:5], "value_counts": bins}
        means = {
            name.replace("counts", "means"): tuple(rng.random(len(v))) for name, v in parts.items() if name[0] != "v"
        }
        lists = {"decoder_neighbours": near, "cofiring": shares}
        feature = Feature(i, 0.01, 9.0, contexts[:20], contexts[20:], tokens, tokens, 0.1, **parts, **means, **lists)
        verdict = {
            "score": 4.0,
            "explanation": "token that starts with `something`",
            "reason": None,
            "deviating": [3, 7],
        }
        rows.append(packed_feature(feature, dialogues, "split", [verdict]))
    sae = {"features": rows, "name": "x", "run": 0}
    html = page({"saes": [sae], "dialogues": dialogues.facts(), "texts": list(dialogues.texts)})
    size = len(html.encode())
    assert 500_000 < size < 3_000_000, size


def test_what_is_missing_is_said_and_not_made(run: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("features", "judge", "page", "report.*", "metrics.jsonl"))
    data = page_data(find_runs([bare]), Wanted(build=False))
    sae = data["saes"][0]
    assert (sae["features"], sae["sample"], sae["figures"], sae["judges"]) == (None, None, None, [])
    assert sae["how"] == f"chatsae report bare --sae {SAE}"
    assert not (bare / "features").exists()


def test_the_verb_writes_the_page_of_a_directory_of_runs(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page_file = run.parent / "report.html"
    assert main(["report", str(run.parent), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["page"] == str(page_file)
    assert facts["bytes"] == page_file.stat().st_size
    assert unpacked(page_file.read_text(encoding="utf-8"))["runs"][0]["name"] == "run"


def test_a_users_mistakes_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["report", str(run), "--sae", "L9"]) == 2
    assert f"it has {SAE}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--features must be at least 1"):
        Wanted(features=0)
    with pytest.raises(UserError, match="given twice"):
        page_data([Run.read(run), Run.read(run)], Wanted(build=False))
