"""The report reads run directories, never a model: tables, curves, a page that is safe to open."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from report_runs import (
    FACTS,
    HOSTILE,
    a_rollout,
    advantages,
    bare_run,
    metric_line,
    record,
    said_turn,
    write_json,
    write_lines,
    write_run,
)
from turnwise.errors import InputError, RunError
from turnwise.report import curves, load_run, markdown_table, paper_table, print_table, table_notes
from turnwise.report.data import spread_groups
from turnwise.report.text import embedded_json, escaped, one_line, shortened, visible
from turnwise.types import Rollout, Task

# --- reading ------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = load_run(write_run(tmp_path / "r", estimator="mt-grpo", seed=4))
    assert (run.name, run.estimator, run.seed, run.notes) == ("r", "mt-grpo", 4, ())
    assert [x.step for x in run.of_split("validation")] == [0, 15, 30, 45, 60]
    # three groups of twelve at each of three recorded steps
    assert len(run.rollouts) == 3 * 3 * 12
    assert run.rollouts[0].task.answers == ("Kenyan shilling", "shilling")
    assert all(len(x.advantages or ()) == len(x.rollout.turns) for x in run.rollouts)


def test_whole_groups_of_steps_evenly_spread_are_read(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(1)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"),), stop="answer")
    task = Task(id="t", question="q", answers=("a",))
    write_lines(path / "rollouts.jsonl", [record(task, step, rollout, [0.5]) for step in range(1, 35)] * 2)
    run = load_run(path, rollouts=24)
    assert [x.step for x in run.rollouts] == [step for step in range(1, 35, 3) for _ in range(2)]
    assert run.num_recorded == 68


def test_first_groups_come_first_and_one_is_kept_whatever_its_size():
    sizes = {(step, group, "q"): 3 for step in (1, 2, 3, 4) for group in (0, 1)}
    assert spread_groups(sizes, 24) == set(sizes)
    assert spread_groups(sizes, 12) == {(step, 0, "q") for step in (1, 2, 3, 4)}
    # 18 rollouts: the four first groups, and of the four second ones the first and the last
    assert spread_groups(sizes, 18) == {*((step, 0, "q") for step in (1, 2, 3, 4)), (1, 1, "q"), (4, 1, "q")}
    assert spread_groups(sizes, 7) == {(1, 0, "q"), (4, 0, "q")}
    assert spread_groups(sizes, 2) == {(1, 0, "q")}
    assert spread_groups({}, 2) == set()


@pytest.mark.parametrize("name", ["token_advantages", "token_values"])
def test_one_number_per_sampled_token_is_required(tmp_path, name):
    path = bare_run(tmp_path / "r", [metric_line(0)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"),), stop="answer")
    line = {**record(Task(id="t", question="q", answers=("a",)), 1, rollout, [1]), name: [0.5]}
    write_lines(path / "rollouts.jsonl", [line])
    with pytest.raises(InputError, match=rf"rollouts\.jsonl:1: {name} must have one entry per sampled token, 2; got 1"):
        load_run(path)


def test_what_is_no_run_directory_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere must be a run directory.*no such directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"must be a run directory.*one of them is missing"):
        load_run(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0)])
    write_json(path / "config.json", {"format": 2, "config": {}})
    with pytest.raises(RunError, match="must have format 1; got 2"):
        load_run(path)


def test_a_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(RunError, match="must hold at least one line"):
        load_run(bare_run(tmp_path / "r", []))


def test_a_half_written_last_line_is_skipped_with_a_note(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0, exact_match=0.25)])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "split": "vali\xc3')  # cut inside a character
    run = load_run(path)
    assert [x.step for x in run.lines] == [0]
    assert run.notes == ("metrics.jsonl:2: a half-written last line was skipped.",)


def test_a_damaged_line_elsewhere_is_an_error_with_its_place(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0)])
    good = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(good + "{oops\n" + good)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2 must be one JSON object"):
        load_run(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[1]", "metrics.jsonl:1 must hold a JSON object; got list"),
        (
            '{"split": "train", "metrics": {}}',
            "metrics.jsonl:1: step must be of type int; got nothing",
        ),
        ('{"step": true, "split": "train", "metrics": {}}', "step must be of type int; got True"),
        (
            '{"step": 1, "split": "train", "metrics": {"f1": "x"}}',
            "metrics.f1 must be a number; got 'x'",
        ),
    ],
)
def test_a_record_of_the_wrong_shape_is_an_error(tmp_path, bad, message):
    path = bare_run(tmp_path / "r", [])
    (path / "metrics.jsonl").write_text(bad + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        load_run(path)


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0, kl=float("nan"), f1=None, exact_match=0.5)])
    run = load_run(path)
    assert run.lines[0].metrics == {"exact_match": 0.5}
    assert "1 values are not finite" in run.notes[0]


def test_a_step_that_a_resumed_run_wrote_again_counts_once(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0, f1=0.1), metric_line(5, f1=0.2), metric_line(5, f1=0.3)])
    run = load_run(path)
    assert [(x.step, x.metrics["f1"]) for x in run.lines] == [(0, 0.1), (5, 0.3)]
    assert "1 lines stand there again" in run.notes[0]


def test_one_advantage_per_turn_is_required(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"),), stop="answer")
    write_lines(
        path / "rollouts.jsonl",
        [record(Task(id="t", question="q", answers=("a",)), 1, rollout, [1, 2])],
    )
    with pytest.raises(InputError, match=r"rollouts\.jsonl:1: advantages must have one entry per turn, 1; got 2"):
        load_run(path)


# --- the table ----------------------------------------------------------------------------------


def test_the_table_holds_mean_and_range_over_seeds(tmp_path):
    ends = [0.2, 0.4, 0.9]
    runs = [
        load_run(bare_run(tmp_path / f"{i}", [metric_line(0, exact_match=0.1), metric_line(9, exact_match=e)], seed=i))
        for i, e in enumerate(ends)
    ]
    (row,) = paper_table(runs)
    end, start = row.cells["exact_match"], row.cells["exact_match_start"]
    assert end is not None
    assert start is not None
    # (0.2 + 0.4 + 0.9) / 3 = 0.5
    assert (row.title, row.seeds, row.population) == ("MT-GRPO", (0, 1, 2), "validation")
    assert (round(end.mean, 9), end.low, end.high, round(start.mean, 9)) == (0.5, 0.2, 0.9, 0.1)
    assert row.cells["tool_execution"] is None  # never a silent zero
    assert "| MT-GRPO | 3 | – | – | – | 10.0 (10.0–10.0) | 50.0 (20.0–90.0) |" in markdown_table([row])


def test_rows_stand_in_the_papers_order_and_others_follow(tmp_path):
    names = ["zeta", "mt-grpo", "alpha", "grpo-or"]
    runs = [load_run(bare_run(tmp_path / n, [metric_line(0, f1=0.1)], estimator=n)) for n in names]
    assert [r.title for r in paper_table(runs)] == ["GRPO-OR", "MT-GRPO", "alpha", "zeta"]


def test_evaluations_make_rows_of_their_own(tmp_path):
    path = bare_run(tmp_path / "r", [metric_line(0, exact_match=0.1), metric_line(9, exact_match=0.2)])
    for name, value in (("test", 0.7), ("test-start", 0.3)):
        number = {"mean": value, "low": 0.0, "high": 1.0, "n": 500}
        write_json(
            path / f"eval-{name}.json",
            {"name": name, "mode": "greedy", "metrics": {"exact_match": number}},
        )
    validation, test = paper_table([load_run(path)])
    assert (validation.population, test.population) == ("validation", "test, greedy")
    assert test.cells["exact_match"].mean == 0.7
    assert test.cells["exact_match_start"].mean == 0.3


def test_notes_tell_what_the_range_does_not_show(tmp_path):
    a = load_run(
        bare_run(tmp_path / "a", [metric_line(0, f1=0.1, exact_match=0.1), metric_line(5, f1=0.1, exact_match=0.1)])
    )
    b = load_run(bare_run(tmp_path / "b", [metric_line(0, f1=0.1)]))
    notes = " ".join(table_notes([a, b]))
    assert "share a seed" in notes
    assert "different steps, 0 to 5" in notes
    assert "Exact match, end comes from 1 of 2 runs" in notes


def test_the_terminal_gets_neither_markup_nor_escapes(tmp_path):
    run = load_run(bare_run(tmp_path / "r", [metric_line(0, exact_match=0.5)], estimator=HOSTILE))
    out = io.StringIO()
    print_table(paper_table([run]), Console(file=out, width=400, force_terminal=True, color_system=None))
    text = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "[bold]rich[/bold]" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)


# --- curves -------------------------------------------------------------------------------------


def test_the_mean_line_stands_where_all_seeds_have_a_value(tmp_path):
    def run(seed, values):
        lines = [metric_line(i, "train", kl=v) for i, v in enumerate(values)]
        return load_run(bare_run(tmp_path / str(seed), lines, seed=seed))

    (chart,) = curves.charts([run(0, [1.0, 3.0, 5.0]), run(1, [3.0, 4.0])])
    (series,) = chart.series
    # (1 + 3) / 2 = 2, (3 + 4) / 2 = 3.5; the third step has one seed only
    assert series.mean == ((0, 2.0), (1, 3.5))
    assert (series.low, series.high) == (((0, 1.0), (1, 3.0)), ((0, 3.0), (1, 4.0)))
    assert [len(s) for s in series.seeds] == [3, 2]


def test_a_long_curve_is_averaged_to_a_bounded_number_of_points():
    points = tuple((i, float(i)) for i in range(1000))
    # 1000 points in 500 bins: the first holds 0 and 1, ends at step 1, mean 0.5
    out = curves.binned(points, 500)
    assert (len(out), out[0], out[-1]) == (500, (1.0, 0.5), (999.0, 998.5))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 60, [0, 20, 40, 60]),
        (-2, 2, [-2, -1, 0, 1, 2]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)


def test_an_estimator_keeps_its_colour_whatever_else_is_shown(tmp_path):
    runs = [load_run(bare_run(tmp_path / n, [metric_line(0)], estimator=n)) for n in ("mt-grpo", "own")]
    assert curves.styles(runs) == {"mt-grpo": 2, "own": 3}


# --- text ---------------------------------------------------------------------------------------


def test_control_and_direction_characters_become_visible():
    assert visible("a\x1b[31m\x00\x7f\u202e\ud800\u00a0b\n\tc") == "a␛[31m␀␡⟨U+202E⟩⟨U+D800⟩ b\n\tc"
    assert one_line(" a\n\nb ") == "a b"


def test_hostile_text_is_escaped_everywhere():
    assert not re.search(r"[<>\"']", escaped(HOSTILE))
    assert json.loads(embedded_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert not re.search(r"[<>&\ud800\u2028]", embedded_json({"a": HOSTILE + "\u2028"}))


def test_long_text_says_how_much_is_missing():
    assert shortened("abcdef", 4) == "abcd … (2 more characters)"
    assert shortened("abcd", 4) == "abcd"


def test_the_fixtures_rewards_are_the_papers():
    rng = np.random.default_rng(0)
    rollouts = [a_rollout(FACTS[0], 0, 1.0, 1.0, rng) for _ in range(3)]
    assert sum(rollouts[0].turn_rewards[0].values()) == pytest.approx(0.7)
    assert advantages("mt-grpo", rollouts) == [[0.0, 0.0]] * 3
