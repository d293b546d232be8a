"""The pictures of docs/report.md: a report in the system's Chromium, light, dark and at a phone's width.

python benchmarks/screenshots.py runs/grpo-or-0 runs/mt-grpo-0
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from turnwise.report import load_run, write_report

IMAGES = Path(__file__).parent.parent / "docs" / "images"
VIEWS = {
    "report-curves": ("light", 1200, 760, ".arms"),
    "report-credit": ("light", 1200, 900, ".pickers"),
    "report-dark": ("dark", 1200, 900, ".pickers"),
    "report-phone": ("light", 390, 844, ".pickers"),
}
"""Colour scheme, width, height and what stands at the top, by name."""


def main(runs: list[str]) -> None:
    """Writes one picture per view."""
    IMAGES.mkdir(exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = write_report([load_run(run) for run in runs], Path(folder) / "report.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (scheme, width, height, top) in VIEWS.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(page.as_uri())
            tab.get_by_label("Order").select_option("credit")
            tab.locator(top).first.evaluate("part => window.scrollTo(0, part.offsetTop - 24)")
            tab.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
