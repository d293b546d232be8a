"""A seeded share of the hostile texts; the whole of it is `python -m turnwise.hostile`."""

import io
import random

import pytest
from rich.console import Console

from turnwise import hostile
from turnwise.chat import BPETokenizer, load_chat
from turnwise.designs import Progress
from turnwise.display import comparison_table
from turnwise.hostile import EMBEDDED, failures, hostile_text, main, stages

STAGES = stages(load_chat(EMBEDDED))


@pytest.mark.parametrize("name", STAGES)
def test_hostile_text_stays_text(name: str):
    check, share = STAGES[name]
    assert failures(name, check, max(60, round(3000 * share)), 7) == []


def test_equal_seeds_make_equal_texts():
    def made(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [hostile_text(rng) for _ in range(20)]

    assert made(1) == made(1) != made(2)


def test_a_page_that_does_not_escape_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hostile, "escaped", lambda text: text)
    assert any("elements of the text's" in fault for fault in failures("page", hostile.page_fault, 100, 0))


def test_a_terminal_that_shows_escapes_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.display.visible", lambda text: text)
    assert any("control character" in fault for fault in failures("terminal", hostile.terminal_fault, 60, 0))


def test_control_tokens_out_of_text_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BPETokenizer, "broken", lambda self, text, names=None: text.encode("utf-8", "replace").decode())
    check, _ = STAGES["tokens"]
    assert any("control token" in fault for fault in failures("tokens", check, 100, 0))


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]):
    assert main(["--count", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(STAGES)
    assert all(line.split("|")[4].strip() == "0" for line in lines[2:])


def test_halves_of_a_character_are_read_back_as_the_character():
    turn = hostile.Turn(action_ids=(1,), sampling_logprobs=(0.0,), text="\ud83d\udc00", action=hostile.Action())
    rollout = hostile.Rollout(task_id="a", group=0, prompt_ids=(1,), turns=(turn,), stop="no_action")
    assert hostile.rollout_from_json(rollout.to_json()).turns[0].text == "\U0001f400"


def test_the_name_of_an_arm_is_no_markup_in_a_comparison():
    run = Progress(arm="[red]a\x1b[2J", seed=0, state="waiting", step=0, share=0.0, wall_s=0.0, metrics={})
    out = io.StringIO()
    Console(file=out, width=110).print(comparison_table("a\x1b[2J", [run]))
    assert "[red]a␛[2J" in out.getvalue()
    assert "\x1b" not in out.getvalue()
