"""A seeded share of the hostile texts; the whole of it is `python -m turnwise.hostile`."""

import io
import random

import pytest
from rich.console import Console

from chats import DATA, QWEN2, needs_data
from turnwise import hostile, hostile_files
from turnwise.chat import BPETokenizer, load_chat
from turnwise.designs import Progress
from turnwise.display import comparison_table
from turnwise.hostile import EMBEDDED, failures, hostile_text, main, published_chats, stages, tokens_check

STAGES = stages(load_chat(EMBEDDED))


@pytest.mark.parametrize("name", STAGES)
def test_hostile_text_stays_text(name: str):
    check, share = STAGES[name]
    assert failures(name, check, 12 if name == "report" else max(60, round(3000 * share)), 7) == []


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


def test_a_page_that_holds_markup_of_a_text_is_found(monkeypatch: pytest.MonkeyPatch):
    write = hostile_files.write_report

    def broken(runs, out):
        write(runs, out)
        page = out.read_text(encoding="utf-8")
        out.write_text(page.replace("</body>", f"{runs[0].rollouts[0].task.question}</body>"), "utf-8", "replace")

    check = hostile_files.report_check()
    assert check("<script>alert(1)</script>") is None
    monkeypatch.setattr(hostile_files, "write_report", broken)
    assert "elements of the text's" in str(check("<img src=x onerror=y>"))
    assert "script" in str(check("<script>alert(1)</script>"))


def test_a_name_that_leads_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch):
    assert failures("paths", hostile_files.paths_check(), 60, 0) == []
    monkeypatch.setattr("turnwise.designs.NAME", r"[\w.+-]+")
    assert STAGES["paths"][0]("..") == "a run of a comparison is elsewhere: '..'"


def test_traces_that_end_a_line_at_any_line_end_of_unicode_are_found(monkeypatch: pytest.MonkeyPatch):
    split = lambda file, *_: [line.encode() for line in file.read().decode().splitlines()]  # noqa: E731
    monkeypatch.setattr("turnwise.records.bounded_lines", split)
    assert failures("traces", STAGES["traces"][0], 60, 0)


def test_a_control_character_that_inspect_prints_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.inspection.visible", lambda text: text)
    assert any("control character" in fault for fault in failures("inspect", hostile_files.inspect_fault, 60, 0))


@needs_data
def test_published_templates_are_framed_as_with_a_plain_text():
    chats = published_chats(DATA / "templates", QWEN2)
    assert len(chats) == 5
    for name, chat in chats.items():
        assert failures(name, tokens_check(chat), 12, 7) == []
