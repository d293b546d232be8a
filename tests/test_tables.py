"""The tables that README.md and docs/ show are what the committed results say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / "experiments" / "tables.py"))


@pytest.mark.parametrize("page", TABLES["PAGES"])
def test_a_pages_tables_are_what_the_results_say(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- table ") == text.count("<!-- end -->")
    assert TABLES["rendered"](text) == text, "write them anew: python experiments/tables.py"


def test_a_number_that_no_result_has_is_replaced():
    page = "Before.\n\n<!-- table searches two-hop -->\n\n| MT-GRPO | .99 |\n\n<!-- end -->\n\nAfter.\n"
    made = TABLES["rendered"](page)
    assert made.startswith("Before.\n\n<!-- table searches two-hop -->\n\n| method |")
    assert made.endswith(" |\n\n<!-- end -->\n\nAfter.\n")
    assert ".99 |" not in made
    assert TABLES["rendered"](made) == made


def test_numbers_are_shares_without_their_zero():
    number, over_seeds = TABLES["number"], TABLES["over_seeds"]
    assert [number(0.5), number(1.0), number(-0.25, 2), number(0.25, 2, sign=True)] == [".500", "1.000", "−.25", "+.25"]
    assert over_seeds([0.1, 0.2, 0.6], 1) == ".3 (.1-.6)"
