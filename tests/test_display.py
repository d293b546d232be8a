"""What the terminal shows."""

import asyncio
import io

import pytest
from rich.console import Console

from turnwise.display import (
    EVALUATED,
    LineDisplay,
    Watched,
    duration,
    evaluation_table,
    number_text,
    progress_panel,
    record_line,
    seconds_left,
    sparkline,
    training_display,
    turn_panel,
)
from turnwise.env import Step, ToolEnvironment
from turnwise.tools import tool
from turnwise.types import Action, Task, ToolCall, ToolResult


def record(step: int, wall_s: float, split: str = "train", **metrics: float) -> dict:
    return {"step": step, "split": split, "wall_s": wall_s, "metrics": metrics}


def printed(renderable, *, terminal: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=terminal, markup=False).print(renderable)
    return out.getvalue()


def test_a_records_line_has_its_step_its_metrics_and_its_time():
    line = record_line(record(7, 65.2, tool_execution=0.5, tokens_per_s=12345.6), 60)
    assert line == "train         7/60  tool execution  50%  tokens/s 12,346  1:05"


def test_time_left_follows_the_last_ten_steps():
    # steps 1 and 2 took 30 s each, then 2 s each: steps 3-12 took 20 s, and 8 steps are left
    train = [record(step, 60 + 2 * (step - 2) if step > 1 else 30) for step in range(1, 13)]
    assert seconds_left(train, 20) == 8 * 2
    assert seconds_left(train[:1], 20) == 19 * 30
    assert seconds_left([], 20) is None


def test_time_left_after_a_resume_counts_steps_not_records():
    assert seconds_left([record(41, 100.0), record(43, 106.0)], 50) == 7 * 3


def test_a_sparkline_is_the_means_of_neighbours():
    assert sparkline([0.0, 1.0], width=10) == "▁█"
    assert sparkline([0.0, 0.0, 1.0, 1.0], width=2) == "▁█"
    assert sparkline([0.0, 1.0], width=1) == "▅"  # 0.5 of 7 blocks is 3.5, rounded to 4
    assert sparkline([-1.0, 2.0], width=2) == "▁█"
    assert sparkline([], width=5) == ""


def test_numbers_and_times_are_short():
    assert [number_text(x) for x in (0.00012345, 1.5, 123456.7)] == ["0.000123", "1.5", "123,457"]
    assert [duration(s) for s in (5, 65, 7380)] == ["0:05", "1:05", "2:03:00"]


def test_the_panel_shows_training_validation_rewards_and_trends():
    rewards = {"reward/tool_execution": 0.1, "reward/xml_format": 0.15}
    train = [
        record(1, 2.0, tool_execution=0.0, exact_match=0.25, **rewards),
        record(2, 4.0, tool_execution=1.0, exact_match=0.5, **rewards),
    ]
    text = printed(progress_panel("mt-grpo", 4, train, [record(0, 0, "validation", exact_match=0.125)]))
    assert "step 2/4" in text
    assert "0:04 left" in text
    assert "▁█" in text
    rows = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    assert "tool execution 100.0% 0.1" in rows
    assert "exact match 50.0% 12.5%" in rows
    assert "xml format 0.15" in rows


def test_a_display_that_is_no_terminal_gets_one_line_a_record():
    out = io.StringIO()
    with training_display("x", 3, Console(file=out, width=40)) as display:
        display.show(record(0, 0.0, "validation", exact_match=0.5, tool_execution=0.25))
        display.show(record(1, 1.0, tool_execution=0.5))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("validation    0/3")


def test_a_terminal_gets_a_panel_that_ends_with_the_last_record():
    out = io.StringIO()
    with training_display("x", 3, Console(file=out, width=90, force_terminal=True)) as display:
        display.show(record(1, 1.0, tool_execution=0.5))
        display.show(record(3, 1.0, tool_execution=0.75))
    assert "step 3/3" in out.getvalue().split("step 1/3")[-1]


def test_an_evaluations_table_has_intervals_and_kinds():
    def estimates(mean: float, n: int) -> dict:
        return {name: {"mean": mean, "low": 0.1, "high": 0.9, "n": n} for name in EVALUATED}

    kinds = {"country": estimates(0.25, 4), "element": estimates(0.75, 6)}
    text = printed(evaluation_table("t", {"metrics": estimates(0.55, 10), "by_kind": kinds}))
    for word in ("all", "10", "55.0", "10–90", "country", "25.0", "element", "75.0", "0.55"):
        assert word in text, word
    alone = {"metrics": estimates(0.55, 10), "by_kind": {"country": estimates(0.55, 10)}}
    assert "country" not in printed(evaluation_table("t", alone))


def test_a_turn_shows_reasoning_call_and_result():
    step = Step(
        action=Action(reasoning="Hm.", tool_calls=(ToolCall(name="search", arguments={"query": "Kåre"}),)),
        results=(ToolResult(text="Kåre\nA name."),),
    )
    lines = [" ".join(line.split()) for line in printed(turn_panel(1, "", step)).splitlines()]
    assert lines == [
        "turn 1 reasoning Hm.",
        'call search {"query": "Kåre"}',
        "result Kåre",
        "A name.",
    ]


def test_a_call_that_could_not_be_read_is_shown_as_written_with_its_error():
    step = Step(action=Action(error="no"), results=(ToolResult(text="must be JSON", error="parse"),))
    text = printed(turn_panel(2, "<tool>{</tool>", step))
    assert "<tool>{</tool>" in text
    assert "error    must be JSON" in text


def test_a_message_without_any_action_is_shown_as_written():
    assert "hello [bold]" in printed(turn_panel(1, "hello [bold]", Step(action=Action())))


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202eabc"])
def test_no_control_character_of_a_text_reaches_the_terminal(hostile: str):
    step = Step(
        action=Action(reasoning=hostile, answer=hostile),
        results=(ToolResult(text=hostile),),
    )
    text = printed(turn_panel(1, hostile, step))
    assert not set(text) & set("\x1b\x07\x9b\u202e")


def test_a_watched_environment_tells_every_step_and_changes_nothing():
    def search(query: str) -> str:
        """Finds."""
        return f"found {query}"

    seen = []
    task = Task(id="1", question="q", answers=())
    environment = Watched(
        ToolEnvironment(task, {"search": tool(search)}),
        lambda text, step: seen.append((text, step)),
    )
    call = '<tool>{"name": "search", "args": {"query": "x"}}</tool>'
    first = asyncio.run(environment.step(call))
    last = asyncio.run(environment.step("<answer>x</answer>"))
    assert environment.start()[1].content == "q"
    assert seen == [(call, first), ("<answer>x</answer>", last)]
    assert first.result is not None
    assert first.result.text == "found x"
    assert last.stop == "answer"


def test_warnings_are_shown_on_a_terminal_and_elsewhere():
    warned = {**record(3, 9.0, exact_match=0.25), "warnings": ["the tool is being abandoned: pay its turns"]}
    text = printed(progress_panel("mt-ppo", 4, [warned, record(4, 12.0, exact_match=0.5)], []))
    assert "warning at step 3: the tool is being abandoned" in text
    out = io.StringIO()
    LineDisplay(4, Console(file=out)).show(warned)
    assert out.getvalue().splitlines()[1] == "warning at step 3: the tool is being abandoned: pay its turns"


def test_what_is_said_of_the_run_is_a_line():
    out = io.StringIO()
    LineDisplay(4, Console(file=out)).say("memory: about 3 GiB\x1b[2J\nand more")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()
