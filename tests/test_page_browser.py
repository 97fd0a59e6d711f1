"""The page in a real browser: what people do with it, without a network and without an error."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatsae.page.data import Wanted, find_runs, page_data
from chatsae.page.write import page as html_page
from feature_samples import FIRST, START, TOKEN, plain_model
from page_browser import NEEDS_BROWSER, Opened
from page_samples import HOSTILE, QUESTIONS, hostile_run, steer

pytestmark = NEEDS_BROWSER

SAE = "L1-1x-standard"
OPEN = (0.5, 2.0)
NARROW = {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("page")
    run = hostile_run(folder / "hostile", plain_model(folder / "model"))
    steer(run)
    shutil.copytree(run, run.parent / "other")
    return page_data(find_runs([run.parent]), Wanted(features=20, contexts=6))


@pytest.fixture(scope="module")
def file(data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, with hostile texts in the place of what a feature promotes and of a run's facts too."""
    sae, n = data["saes"][0], len(data["texts"])
    verdicts = [[4.0, f"planted {HOSTILE[0]}", [0, 2]] for _ in sae["judges"]]
    first = sae["features"][0] | {"up": [[n + i, 0.5] for i in range(len(HOSTILE))], "verdicts": verdicts}
    steering = sae["steering"]
    (sweep,) = steering["sweeps"]
    feature = sweep["windows"]["feature"] | {
        "from": OPEN[0],
        "to": OPEN[1],
        "open": True,
    }  # of two questions there is none
    sweeps = [sweep | {"windows": sweep["windows"] | {"feature": feature}}]
    judges = [with_random_weights(judge) for judge in sae["judges"]]
    features = [first, *sae["features"][1:]]
    changed = {"features": features, "steering": steering | {"sweeps": sweeps}, "judges": judges}
    saes = [sae | changed, *data["saes"][1:]]
    runs = [run | {"identity": [*run["identity"], ["Hostile", HOSTILE[0]]]} for run in data["runs"]]
    path = tmp_path_factory.mktemp("out") / "report.html"
    path.write_text(
        html_page(data | {"texts": [*data["texts"], *HOSTILE], "runs": runs, "saes": saes}), encoding="utf-8"
    )
    return path


def with_random_weights(judge: dict) -> dict:
    """What a judge's file holds where the SAE of a model with random weights was judged too."""
    calibration, above = judge["calibration"], judge["summary"]["above"]
    control = calibration["controls"]["random_directions"] | {"what": "An SAE of random weights.", "run": "r"}
    calibration = calibration | {"controls": calibration["controls"] | {"random_weights": control}}
    minus = {"mean": {"difference": 1.25, "interval": [0.5, 2.0]}, "high": {"difference": 0.25, "interval": None}}
    summary = judge["summary"] | {"above": above | {"random_weights": minus}}
    return judge | {"calibration": calibration, "summary": summary}


@pytest.fixture
def opened(browser, file: Path) -> Iterator:
    pages: list[Opened] = []

    def one(address: str = "", **options):
        pages.append(Opened(browser, file, address, **options))
        return pages[-1].page

    yield one
    for each in pages:
        each.close()


def shown(page) -> list[int]:
    return [int(i) for i in page.locator("#list li").evaluate_all("rows => rows.map(row => row.dataset.i)")]


def to_overview(page) -> None:
    """An address acts when the browser says that it has changed, not at once."""
    page.locator("#tab-overview").click()
    page.wait_for_selector("#overview:not([hidden])")


def test_the_overview_shows_what_the_data_hold(opened, data: dict, tmp_path: Path) -> None:
    page = opened()
    titles = page.locator("#overview h2").all_text_contents()
    for title in ("Held-out dialogues", "Identity", "Error by role and kind", "Norm and error", "Training"):
        assert title in titles
    figure = data["saes"][0]["figures"]["mse"]["value"]
    first = page.locator("table.metrics tbody tr").first.text_content()
    assert f"{figure:.3g}" in first
    assert page.locator("#overview svg[role=img]").count() >= 6
    labels = page.locator("svg[role=img]").evaluate_all("charts => charts.map(c => c.getAttribute('aria-label'))")
    assert all(label and "NaN" not in label and "undefined" not in label for label in labels)
    assert not re.search(r"NaN|undefined|\[object", page.locator("#overview").inner_text())
    page.screenshot(path=tmp_path / "overview.png", full_page=True)


def test_searching_and_sorting_choose_from_the_list(opened, data: dict) -> None:
    page = opened(f"#{SAE}")
    features = data["saes"][0]["features"]
    assert sorted(shown(page)) == sorted(f["i"] for f in features)
    page.click("button[data-sort=density]")
    density = {f["i"]: f["density"] for f in features}
    assert shown(page) == sorted(density, key=lambda i: (-density[i], i))
    page.click("button[data-sort=density]")
    assert shown(page) == sorted(density, key=lambda i: (density[i], i))
    page.click("button[data-sort=first]")
    assert shown(page)[0] == FIRST
    score = {f["i"]: f["verdicts"][0][0] for f in features[1:]} | {features[0]["i"]: 4.0}
    page.click("button[data-sort=score]")
    found = [-1 if score[i] is None else score[i] for i in shown(page)]
    assert found == sorted(found, reverse=True)
    assert len(found) == len(features)
    page.click("button[data-sort=roleAffinity]")
    affinity = [float(text.split()[-1]) for text in page.locator("#list .role").all_text_contents()]
    assert affinity == sorted(affinity, reverse=True)
    assert affinity[0] > 0.5
    page.fill("#search", "<|im_end|>")
    assert TOKEN in shown(page)
    assert len(shown(page)) < len(features)
    page.fill("#search", "nothing has this text")
    assert shown(page) == []
    assert page.locator("#count").inner_text().startswith("0 of")
    page.fill("#search", "")
    page.select_option("#by-density", "0.1,2")
    assert sorted(shown(page)) == sorted(i for i, d in density.items() if d >= 0.1)


def test_an_address_opens_a_feature_with_its_contexts(opened, data: dict, tmp_path: Path) -> None:
    page = opened(f"#{SAE}/{TOKEN}")
    assert page.locator("#feature h1").inner_text() == f"Feature {TOKEN}"
    top = next(f for f in data["saes"][0]["features"] if f["i"] == TOKEN)["top"]
    assert page.locator(".contexts .context").count() >= len(top)
    context = page.locator(".contexts .context").first
    assert context.locator(".peak").inner_text() == "<|im_end|>"
    assert "chip" in context.locator(".peak").get_attribute("class")
    assert {"user", "assistant"} & set(context.locator(".band").all_inner_texts())
    page.screenshot(path=tmp_path / "feature.png")
    to_overview(page)
    page.go_back()
    page.locator("#feature h1", has_text=f"Feature {TOKEN}").wait_for()


def test_two_runs_have_addresses_of_their_own(opened, data: dict) -> None:
    names = [run["name"] for run in data["runs"]]
    page = opened(f"#{names[1]}/{SAE}/{TOKEN}")
    assert page.locator("#feature > header .method").inner_text() == names[1]
    page.select_option("#sae", "0")
    page.locator("#feature > header .method", has_text=names[0]).wait_for()
    assert page.evaluate("location.hash") == f"#{SAE}"


def test_what_is_not_there_is_told(opened) -> None:
    assert opened("#%").locator("#overview").is_visible()
    page = opened(f"#{SAE}/127")
    assert "--only 127" in page.locator("#feature").inner_text()


def test_keys(opened) -> None:
    page = opened()
    page.keyboard.press("/")
    page.locator("#search:focus").wait_for()
    page.keyboard.type("im_")
    order = shown(page)
    assert len(order) >= 2
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '#overview'")
    page.evaluate("location.hash = '#features'")
    page.wait_for_selector("#feature h1")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.locator("#feature h1", has_text=f"Feature {order[1]}").wait_for()
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.locator("#feature h1", has_text=f"Feature {order[0]}").wait_for()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector("#overview:not([hidden])")


def test_hostile_text_is_shown_as_text(opened, data: dict) -> None:
    page = opened(f"#{SAE}/{data['saes'][0]['features'][0]['i']}")
    promoted = page.locator("aside").inner_text()
    assert "<script>window.owned" in promoted
    assert "␀␇" in promoted
    assert "‹U+202E›" in promoted
    assert "שלום" in promoted
    assert page.locator("#feature img, #feature script").count() == 0
    to_overview(page)
    assert HOSTILE[0] in page.locator("#overview").inner_text()


def test_deviating_contexts_are_marked_and_the_judge_is_shown_beside_them(opened, data: dict) -> None:
    page = opened(f"#{SAE}/{data['saes'][0]['features'][0]['i']}")
    marked = page.locator(".context").evaluate_all("all => all.map(c => c.classList.contains('deviating'))")
    assert [rank for rank, deviates in enumerate(marked) if deviates] == [0, 2]
    assert "4 of 5, 2 deviating" in page.locator(".verdict").inner_text()
    to_overview(page)
    known = data["saes"][0]["judges"][0]["calibration"]["accuracy"]
    panel = page.locator(".panel", has_text="How far to believe the pattern judge").inner_text()
    assert f"{round(100 * known['share'])} % [" in panel


def test_the_judge_is_shown_beside_what_has_no_meaning(opened, data: dict) -> None:
    page = opened("#overview/scores")
    judge = data["saes"][0]["judges"][0]
    rows = page.locator(".panel", has_text="How far to believe").locator("tr").all_inner_texts()
    for kind, text in (("random", "random tokens"), ("random_directions", "random directions")):
        (row,) = [row for row in rows if row.startswith(text)]
        minus = judge["summary"]["above"][kind]["mean"]
        assert f"{minus['difference']:+.2f}".replace("-", "−") in row
        assert f"{minus['interval'][0]:+.2f}".replace("-", "−") in row
    (row,) = [row for row in rows if row.startswith("random weights")]
    assert "+1.25 [+0.50, +2.00]" in row
    assert "+25" in row
    assert judge["calibration"]["controls"]["random_directions"]["what"] in page.locator("#overview").inner_text()


def test_runs_are_compared_with_intervals_and_their_scores_are_in_one_picture(opened, data: dict) -> None:
    page = opened()
    (compared,) = data["comparison"]
    row = page.locator(".panel", has_text="Between the runs").locator("tbody tr").first.inner_text()
    assert row.startswith(f"{compared['methods'][0]['label']} − {compared['methods'][1]['label']}")
    assert row.split("\t")[1].strip().startswith("0.0 [")  # equal runs
    picture = page.locator(".panel", has_text="Scores of features").locator("svg.chart").first
    assert picture.locator("path.line").count() == picture.locator("path.belt").count() == 2


def test_a_feature_of_the_special_tokens_opens_by_a_click(opened, data: dict, tmp_path: Path) -> None:
    page = opened("#overview/special")
    assert page.locator("#part-special").evaluate("e => e.getBoundingClientRect().top < innerHeight")
    row = page.locator("table.special tbody tr", has_text="<|im_end|>").first
    row.locator("a").first.click()
    page.locator("#feature h1", has_text=f"Feature {TOKEN}").wait_for()
    assert "no. 1, mean" in page.locator("#feature > header .note").inner_text()
    to_overview(page)
    page.screenshot(path=tmp_path / "special.png")


def test_the_list_is_filtered_by_the_token_a_feature_fires_on(opened) -> None:
    page = opened(f"#{SAE}")
    page.select_option("#by-token", "<|im_end|>")
    assert TOKEN in shown(page)
    assert START not in shown(page)
    page.select_option("#by-token", "<|im_start|>")
    assert TOKEN not in shown(page)
    assert START in shown(page)


def test_answers_stand_side_by_side(opened, data: dict, tmp_path: Path) -> None:
    page = opened(f"#{SAE}/{TOKEN}")
    page.locator(".to").click()
    (examples,) = data["saes"][0]["steering"]["examples"][str(TOKEN)]
    for shown_, (prompt, base, answers) in zip(page.locator(".steer").all(), examples["prompts"], strict=True):
        assert prompt in QUESTIONS
        assert prompt in shown_.inner_text()
        columns = shown_.locator(".columns-of > div")
        assert columns.count() == 1 + len(answers) - 1  # alpha 0 answers as without steering
        places = [column.bounding_box() for column in columns.all()]
        assert len({round(place["y"]) for place in places}) == 1
        assert columns.nth(1).locator(".answer").text_content().startswith(answers[1][1][:3])
        assert columns.first.locator(".answer").text_content().startswith(base[:3])
    page.screenshot(path=tmp_path / "steering.png")


def test_the_window_is_drawn_where_it_is(opened, data: dict) -> None:
    page = opened(f"#{SAE}/{TOKEN}")
    (sweep,) = data["saes"][0]["steering"]["sweeps"]
    alphas = [strength[1] for strength in sweep["strengths"]]
    chart = page.locator("#steering svg.chart", has=page.locator("rect.span")).first
    span = chart.locator("rect.span")
    points = re.findall(r"[ML]([\d.]+) ", chart.locator("path.line").first.get_attribute("d"))
    left, right = (float(points[alphas.index(alpha)]) for alpha in OPEN)
    assert float(span.get_attribute("x")) == pytest.approx(left, abs=0.1)
    assert float(span.get_attribute("width")) == pytest.approx(right - left, abs=0.2)
    assert chart.locator("path.line").count() == len(sweep["arms"]) == 3
    rows = page.locator("table.answers tbody tr")
    assert rows.count() == len(alphas) - 1
    page.locator("#steering select").select_option("1")
    last = rows.last.locator("td").nth(4).inner_text()
    answer = sweep["answers"]["feature"][-1][1][0]
    assert last.startswith(answer[:3]) or last == "unchanged"


def test_neighbours_open_and_the_page_tells_how_it_was_made(opened, data: dict) -> None:
    features = {f["i"]: f for f in data["saes"][0]["features"]}
    known = {i: {row[0] for row in f["near"][:8] + f["with"][:8]} & set(features) for i, f in features.items()}
    start = next(i for i, others in known.items() if others)
    page = opened(f"#{SAE}/{start}")
    page.locator("aside .panel", has_text="Neighbours").locator("a").first.click()
    page.locator("#feature h1").filter(has_not_text=f"Feature {start}").wait_for()
    assert int(page.locator("#feature h1").inner_text().removeprefix("Feature ")) in known[start]
    to_overview(page)
    commands = page.locator(".panel", has_text="How to make this again").locator("code").all_inner_texts()
    assert commands == [line for _, line in data["runs"][0]["commands"]] + [data["command"]]


def test_many_runs_are_told_apart_by_their_method(browser, data: dict, tmp_path: Path) -> None:
    methods = ["fast"] * 3 + ["bt-f"] * 3 + ["bt-p"] * 3
    runs = [data["runs"][0] | {"name": f"{m}/{i}", "path": f"{m}/{i}", "method": m} for i, m in enumerate(methods)]
    saes = [data["saes"][0] | {"run": i} for i in range(9)]
    file = tmp_path / "many.html"
    file.write_text(html_page(data | {"saes": saes, "runs": runs, "comparison": []}), encoding="utf-8")
    many = Opened(browser, file, "")
    stroke = "all => all.map(path => getComputedStyle(path).stroke)"
    colours = many.page.locator(".flow figure").first.locator("path.line").evaluate_all(stroke)
    assert [colours.index(colour) for colour in colours] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert "none" not in colours
    many.close()


def test_a_run_without_anything_tells_what_makes_it(browser, data: dict, tmp_path: Path) -> None:
    lacking = {"store": None, "sample": None, "special": None, "steering": None, "judges": [], "features": None}
    saes = [sae | lacking | {"figures": None, "firing": None, "how": "chatsae report R"} for sae in data["saes"][:1]]
    runs = [run | {"curves": {}, "evaluated": None} for run in data["runs"][:1]]
    file = tmp_path / "bare.html"
    file.write_text(html_page(data | {"saes": saes, "runs": runs, "comparison": []}), encoding="utf-8")
    bare = Opened(browser, file, "")
    said = bare.page.locator("#overview").inner_text()
    for command in ("chatsae eval", "chatsae report R", "chatsae tokens", "chatsae steer"):
        assert command in said
    assert not re.search(r"NaN|undefined|\[object", said)
    bare.page.locator("#tab-features").click()
    bare.page.locator("#feature code", has_text="chatsae report R").wait_for()
    bare.close()


def test_light_and_dark(opened, tmp_path: Path) -> None:
    paper = "getComputedStyle(document.querySelector('.panel')).backgroundColor"
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert light.evaluate(paper) == "rgb(255, 255, 255)"
    assert dark.evaluate(paper) == "rgb(23, 27, 33)"
    dark.screenshot(path=tmp_path / "dark.png")
    dark.keyboard.press("t")
    assert dark.evaluate(paper) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("address", ["", f"#{SAE}", f"#{SAE}/{TOKEN}"])
def test_a_narrow_window_needs_no_scrolling_sideways(opened, address: str, tmp_path: Path) -> None:
    page = opened(address, viewport=NARROW)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    page.screenshot(path=tmp_path / "narrow.png")
    if address.endswith(f"/{TOKEN}"):
        assert not page.locator("#side").is_visible()
        page.locator(".back").click()
        page.locator("#list li").first.wait_for()


def test_it_prints_all_of_a_feature(opened) -> None:
    page = opened(f"#{SAE}/{TOKEN}")
    page.emulate_media(media="print")
    assert not page.locator("#side").is_visible()
    assert page.locator("#feature").evaluate("e => e.scrollHeight <= e.clientHeight + 1")


def test_paper_is_white_and_nothing_on_it_is_cut(opened) -> None:
    page = opened(color_scheme="dark", viewport={"width": 700, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor") == "rgb(255, 255, 255)"
    cut = "getComputedStyle(e).overflowX !== 'visible' && e.scrollWidth > e.clientWidth + 1"
    assert page.locator("#overview .scroll").evaluate_all(f"all => all.filter(e => {cut}).length") == 0
