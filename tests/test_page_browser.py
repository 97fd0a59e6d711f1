"""The page in a real browser: what people do with it, without a network and without an error."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatsae.page.data import Wanted, find_runs, page_data
from chatsae.page.write import page as html_page
from feature_samples import FIRST, TOKEN, plain_model
from page_samples import HOSTILE, hostile_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (chatsae[dev])")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium (Debian: apt install chromium)")

SAE = "L1-1x-standard"
WIDE, NARROW = {"width": 1600, "height": 1000}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("page")
    run = hostile_run(folder / "hostile", plain_model(folder / "model"))
    shutil.copytree(run, run.parent / "other")
    return page_data(find_runs([run.parent]), Wanted(features=20, contexts=6))


@pytest.fixture(scope="module")
def file(data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, with hostile texts in the place of what a feature promotes and of a run's facts too."""
    sae, n = data["saes"][0], len(data["texts"])
    verdicts = [[4.0, f"planted {HOSTILE[0]}", [0, 2]] for _ in sae["judges"]]
    first = sae["features"][0] | {"up": [[n + i, 0.5] for i in range(len(HOSTILE))], "verdicts": verdicts}
    saes = [sae | {"features": [first, *sae["features"][1:]]}, *data["saes"][1:]]
    runs = [run | {"identity": [*run["identity"], ["Hostile", HOSTILE[0]]]} for run in data["runs"]]
    path = tmp_path_factory.mktemp("out") / "report.html"
    path.write_text(
        html_page(data | {"texts": [*data["texts"], *HOSTILE], "runs": runs, "saes": saes}), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page, and everything that it said or asked for that it should not have."""

    def __init__(self, browser, file: Path, address: str, **options) -> None:
        self.context = browser.new_context(**({"viewport": WIDE} | options))
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(file.as_uri() + address)
        self.page.wait_for_selector("html[data-ready]")

    def _asked(self, request) -> None:
        if not request.url.startswith(("file:", "data:")) or not request.is_navigation_request():
            self.faults.append(f"request: {request.url}")

    def close(self) -> None:
        assert self.page.evaluate("window.owned") is None
        self.context.close()
        assert self.faults == []


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
    page.locator("#tab-overview").click()
    assert page.locator("#overview").is_visible()
    page.go_back()
    assert page.locator("#feature h1").inner_text() == f"Feature {TOKEN}"


def test_two_runs_have_addresses_of_their_own(opened, data: dict) -> None:
    names = [run["name"] for run in data["runs"]]
    page = opened(f"#{names[1]}/{SAE}/{TOKEN}")
    assert page.locator("#feature .method").inner_text() == names[1]
    page.select_option("#sae", "0")
    assert page.locator("#feature .method").inner_text() == names[0]
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
    page.evaluate("location.hash = '#overview'")
    assert HOSTILE[0] in page.locator("#overview").inner_text()


def test_deviating_contexts_are_marked_and_the_judge_is_shown_beside_them(opened, data: dict) -> None:
    page = opened(f"#{SAE}/{data['saes'][0]['features'][0]['i']}")
    marked = page.locator(".context").evaluate_all("all => all.map(c => c.classList.contains('deviating'))")
    assert [rank for rank, deviates in enumerate(marked) if deviates] == [0, 2]
    assert "4 of 5, 2 deviating" in page.locator(".verdict").inner_text()
    page.locator("#tab-overview").click()
    known = data["saes"][0]["judges"][0]["calibration"]["accuracy"]
    panel = page.locator(".panel", has_text="How far to believe the pattern judge").inner_text()
    assert f"{round(100 * known['share'])} % [" in panel


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
        assert page.locator("#list li").first.is_visible()


def test_it_prints_all_of_a_feature(opened) -> None:
    page = opened(f"#{SAE}/{TOKEN}")
    page.emulate_media(media="print")
    assert not page.locator("#side").is_visible()
    assert page.locator("#feature").evaluate("e => e.scrollHeight <= e.clientHeight + 1")
