"""The examples run as a user runs them, on few steps, and print what they claim."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = {
    "own_tools.py": (["--steps=1"], r"exact_match: \d+% of 20 questions before, \d+% after training"),
    "documents.py": (["--steps=1"], r"exact match: \d+% of 24 questions before, \d+% after training"),
    "calculator.py": (
        ["--steps=1", "--shown=2"],
        r"exact_match: \d+% of 60 held-out problems before training, \d+% after training",
    ),
}


def printed(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def share_after(text: str) -> int:
    """The per cent that the line on exact match ends with."""
    found = re.search(r"exact.match: .* (\d+)% after", text)
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs_and_prints_its_claim(name: str):
    options, claim = QUICK[name]
    assert re.search(claim, printed(name, *options))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("own_tools.py", 70), ("documents.py", 70), ("calculator.py", 90)])
def test_an_example_as_it_stands_learns(name: str, least: int):
    assert share_after(printed(name)) >= least


def test_every_example_is_short_and_has_a_section():
    sections = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 100, path.name
        assert f"## `{path.name}`" in sections
