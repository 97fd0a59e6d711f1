"""A browser, and a page in it that may say nothing to the console and ask for nothing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (chatsae[dev])")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium (Debian: apt install chromium)"
)
WIDE = {"width": 1600, "height": 1000}


@contextmanager
def started() -> Iterator:
    """The browser, until the end of the block."""
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


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
        assert not self.faults, self.faults
