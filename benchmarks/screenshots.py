"""The pictures and numbers of docs/report.md: a report in the system's Chromium, light, dark and at a phone's width.

python benchmarks/screenshots.py runs/mt-grpo-0 runs/mt-ppo-0

The last run is the one whose tokens are shown. Prints the page's size, how many elements its rollouts take, and how
long choosing another outcome or order takes until the browser has laid the page out anew.
"""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import sync_playwright

from turnwise.report import load_run, write_report

IMAGES = Path(__file__).parent.parent / "docs" / "images"
CHANGES = [("by-outcome", "wrong"), ("by-order", "down"), ("by-outcome", ""), ("by-order", "credit")] * 10
CHANGE = """([id, value]) => {
  const field = document.getElementById(id), start = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  document.body.offsetHeight;
  return performance.now() - start;
}"""

MOST_DIFFERENT = """() => {
  const { rollouts } = JSON.parse(document.getElementById("data").textContent);
  const spread = (place) => {
    const own = rollouts[place].turns.flatMap((turn) => (turn.by_token ? turn.by_token.advantages : []));
    return rollouts[place].turns.length > 1 ? Math.max(0, ...own) - Math.min(0, ...own) : -1;
  };
  const places = [...document.querySelectorAll(".row")].map((row) => Number(row.dataset.rollout));
  return places.sort((a, b) => spread(b) - spread(a))[0];
}"""


def scrolled_to(tab: Any, part: str) -> None:
    tab.locator(part).first.evaluate("part => window.scrollTo(0, part.getBoundingClientRect().top + scrollY - 16)")


def curves(tab: Any) -> None:
    scrolled_to(tab, ".arms")


def browser(tab: Any) -> None:
    """The list, with a rollout open in which a turn is praised although the outcome is bad."""
    tab.get_by_label("Sign").select_option("outcome")
    tab.get_by_label("Order").select_option("up")
    tab.locator(".row").first.click()
    scrolled_to(tab, "#filters")


def opened(tab: Any) -> None:
    browser(tab)
    scrolled_to(tab, ".rollout")


def group(tab: Any) -> None:
    browser(tab)
    tab.locator(".actions button").first.click()
    scrolled_to(tab, "#group")


def tokens(tab: Any) -> None:
    """A rollout of the last run, of several turns whose tokens differ most, the number of one of them read out."""
    tab.get_by_label("Method or run").select_option(index=tab.locator("#by-run option").count() - 1)
    tab.locator(f'.row[data-rollout="{tab.evaluate(MOST_DIFFERENT)}"]').click()
    tab.locator(".said").first.focus()
    for _ in range(13):
        tab.keyboard.press("ArrowRight")
    scrolled_to(tab, ".rollout")


VIEWS: dict[str, tuple[Literal["light", "dark"], int, int, Callable[[Any], None]]] = {
    "report-curves": ("light", 1200, 760, curves),
    "report-credit": ("light", 1200, 980, browser),
    "report-group": ("light", 1200, 860, group),
    "report-tokens": ("light", 1200, 760, tokens),
    "report-dark": ("dark", 1200, 980, browser),
    "report-phone": ("light", 390, 844, browser),
    "report-phone-turn": ("dark", 390, 844, opened),
    "report-phone-group": ("light", 390, 844, group),
}
"""Colour scheme, width, height and what is shown, by name."""


def main(runs: list[str]) -> None:
    """Writes one picture per view, and prints the numbers."""
    IMAGES.mkdir(exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = write_report([load_run(run) for run in runs], Path(folder) / "report.html")
        chrome = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (scheme, width, height, act) in VIEWS.items():
            tab = chrome.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(page.as_uri())
            act(tab)
            tab.screenshot(path=IMAGES / f"{name}.png")
            tab.close()
        tab = chrome.new_page(viewport={"width": 1200, "height": 900})
        tab.goto(page.as_uri())
        found = tab.locator("#found").text_content()
        elements = tab.evaluate("document.getElementById('browser').querySelectorAll('*').length")
        times = [tab.evaluate(CHANGE, list(change)) for change in CHANGES]
        print(f"{found}: {page.stat().st_size / 1e6:.2f} MB, {elements} elements")
        print(f"a filter or an order: {statistics.median(times):.0f} ms, at most {max(times):.0f} ms")
        chrome.close()


if __name__ == "__main__":
    main(sys.argv[1:])
