"""Draw docs/img/report-light.png and report-dark.png from a page that `chatsae report` wrote (needs chromium)."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "img"
MOST = 300 * 1024
VIEWS = (("light", "#overview"), ("dark", "#features"))


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/report.html")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path.is_file() or browser_path is None:
        what = f"{path} does not exist; `chatsae report runs/demo` writes it" if browser_path else "no chromium found"
        print(what, file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for theme, address in VIEWS:
            page = browser.new_page(
                viewport={"width": 1600, "height": 1000},
                device_scale_factor=2,
                color_scheme="dark" if theme == "dark" else "light",
            )
            page.goto(path.resolve().as_uri() + address)
            page.wait_for_selector("html[data-ready]")
            size = _save(page.screenshot(), FOLDER / f"report-{theme}.png")
            print(f"{FOLDER.name}/report-{theme}.png: {size / 1024:.0f} KB")
        browser.close()
    return 0


def _save(shot: bytes, path: Path) -> int:
    """Write a screenshot with as many colours as keep it below `MOST` bytes."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (256, 128, 64, 32):
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MOST:
            return path.stat().st_size
    raise SystemExit(f"{path} is larger than {MOST // 1024} KB with 32 colours")


if __name__ == "__main__":
    sys.exit(main())
