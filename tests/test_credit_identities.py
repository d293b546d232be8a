"""The table of checked identities in docs/credit.md names tests that exist and say which identity they are of."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "credit.md"
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
ROWS = {int(number): (proven, broken) for number, _, proven, broken in ROW.findall(PAGE.read_text(encoding="utf-8"))}


def source(file: str, name: str) -> str:
    """The text of a test function, with the comments on and below its first line."""
    text = (HERE / file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"docs/credit.md names {file}::{name}, which does not exist")


def of_identity(number: int, text: str) -> bool:
    named = re.findall(r"[Ii]dentit(?:y|ies) ((?:\d+(?:, | and )?)+)", text)
    return str(number) in " ".join(named).replace(",", " ").split()


def test_every_identity_of_what_is_here_is_in_the_table():
    assert sorted(ROWS) == [number for number in range(1, 36) if number != 30]


@pytest.mark.parametrize("number", ROWS)
def test_the_tests_of_the_table_exist_and_name_their_identity(number: int):
    proven, broken = (TEST.findall(cell) for cell in ROWS[number])
    assert proven
    assert broken or ROWS[number][1] == "the same"
    for file, name in (*proven, *broken):
        assert of_identity(number, source(file, name)), f"{file}::{name} does not say that it is of identity {number}"


def test_a_test_that_is_missing_or_of_another_identity_is_seen():
    with pytest.raises(AssertionError, match="does not exist"):
        source("test_credit.py", "test_that_nobody_wrote")
    assert of_identity(13, "def test_x():  # identities 13 and 32, broken")
    assert not of_identity(3, "def test_x():  # identities 13 and 32, broken")
