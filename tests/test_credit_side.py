"""`turnwise credit`: recorded rollouts under several methods, in the terminal and as a page."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from report_runs import write_run
from turnwise.cli import main
from turnwise.credit import ESTIMATORS, NEEDS, ONE_PER_ROLLOUT, TOKEN_ESTIMATORS, mt_grpo, turn_table
from turnwise.report.side import lines_by_group, side_by_side_page
from turnwise.traces import read_traces, traces_table

ROLLOUTS = [
    {"group": "q", "turns": [{"rewards": {"found": 1}, "text": "<b>look</b>"}, {}], "outcome": {"right": 1}},
    {"group": "p", "turns": [{"rewards": {"found": 1}}]},
    {"group": "q", "turns": [{"rewards": {"found": 0}}, {}], "outcome": {"right": 0}},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ROLLOUTS))
    return path


def test_the_turns_of_a_group_stand_together_with_their_own_advantages(file: Path):
    traces = read_traces(file)
    found = mt_grpo(traces_table(traces)).advantages
    groups = dict(lines_by_group(traces, {"mt-grpo": found}))
    assert [line.advantages["mt-grpo"] for line in groups["q"]] == pytest.approx([*found[:2], *found[3:]])
    assert [line.turn for line in groups["q"]] == [0, 1, 0, 1]
    assert groups["q"][1].rewards == "right 1 (outcome)"
    assert [line.advantages["mt-grpo"] for line in groups["p"]] == pytest.approx([found[2]])


def test_the_command_prints_all_methods_that_the_file_has_columns_for(file: Path, tmp_path: Path, capsys):
    out = tmp_path / "side.html"
    assert main(["credit", str(file), "--groups", "1", "--methods", "mt-grpo", "grpo-or", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mt-grpo" in shown
    assert "1 more groups" in shown
    page = out.read_text()
    assert "&lt;b&gt;look" in page
    assert "<b>look" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<tr") == 2 + 5  # a head per group, and a row per turn


def test_a_method_without_its_column_is_refused(file: Path, capsys):
    assert main(["credit", str(file), "--methods", "gigpo"]) == 2
    assert "must have anchor in every turn for gigpo" in capsys.readouterr().err
    assert main(["credit", str(file), "--methods", "mt-grop"]) == 2
    assert "did you mean mt-grpo" in capsys.readouterr().err


def test_methods_of_tokens_are_shown_by_the_mean_of_their_turns(tmp_path: Path, capsys):
    # γ = λ = 1, outcome 2: to go 2 everywhere, minus values 0, 1 | 5: 2, 1 | −3; means 1.5 and −3
    path, out = tmp_path / "t.jsonl", tmp_path / "t.html"
    turns = [{"token_values": [0, 1], "value": 0}, {"token_values": [5], "value": 1}]
    path.write_text(json.dumps({"group": "q", "turns": turns, "outcome": {"right": 2}}) + "\n")
    assert main(["credit", str(path), "--methods", "ppo-or", "vetta", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "+1.50" in shown
    assert "-3.00" in shown.replace("−", "-")
    turns[0].pop("value")
    path.write_text(json.dumps({"group": "q", "turns": turns, "outcome": {"right": 2}}) + "\n")
    assert main(["credit", str(path), "--methods", "vetta"]) == 2
    assert "must have value in every turn for vetta" in capsys.readouterr().err
    assert main(["credit", str(path), "--methods", "mt-ppo"]) == 0


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_printed(file: Path, tmp_path: Path, capsys):
    for out in (tmp_path / "nowhere" / "x.html", tmp_path):
        assert main(["credit", str(file), "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert "must be writable" in said.err
        assert said.out == ""


def test_a_runs_rollouts_have_tokens_and_anchors(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", estimator="mt-grpo", seed=0)
    assert main(["credit", str(run / "rollouts.jsonl"), "--methods", "gigpo", "reinforce++"]) == 0
    assert "gigpo" in capsys.readouterr().out


def test_the_page_of_many_groups_says_what_is_left_out(file: Path):
    traces = [t for t in read_traces(file) if t.group == "p"]
    many = [dataclasses.replace(traces[0], group=str(i)) for i in range(70)]
    page = side_by_side_page(many, {"x": np.zeros(70)}, "f")
    assert "10 more groups are left out" in page


# ------------------------------------------------------------------------------- the names


def full_table():
    """Two groups of ragged rollouts with every optional column."""
    return turn_table(
        [0, 0, 0, 1, 1],
        [[{"r": 1.0}, {"r": 0.0}], [{"r": 1.0}, {}], [{}], [{"r": 0.5}, {}], [{"r": 0.25}, {}]],
        [{"o": 1.0}, {"o": 0.0}, {"o": 2.0}, {"o": 1.0}, {"o": 0.0}],
        values=[[0.5, 0.2], [0.1, 0.3], [0.4], [0.2, 0.1], [0.0, 0.6]],
        anchors=[["s", "t"], ["s", "t"], ["s"], ["s", "u"], ["s", "u"]],
        nodes=[["a", "b"], ["a", "c"], ["d"], ["e", "f"], ["g", "h"]],
        tokens=[[2, 3], [2, 1], [4], [1, 1], [2, 2]],
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_name_gives_a_finite_number_per_turn_and_says_what_it_lacks(name: str):
    found = ESTIMATORS[name](full_table()).advantages
    assert found.shape == full_table().rollout.shape
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0
    bare = turn_table([0, 0], [[{"r": 1.0}], [{}]], [{}, {"o": 1.0}])
    if name in NEEDS:
        with pytest.raises(ValueError, match=f"needs the column '{NEEDS[name][0]}'"):
            ESTIMATORS[name](bare)
    else:
        assert np.isfinite(ESTIMATORS[name](bare).advantages).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_those_that_give_one_number_per_rollout_are_named(name: str):
    table = full_table()
    found = ESTIMATORS[name](table).advantages
    first = found[np.append(0, table.last[:-1] + 1)]
    if name in ONE_PER_ROLLOUT:
        assert_allclose(found, first[table.rollout])
    else:
        assert np.abs(found - first[table.rollout]).max() > 1e-6


def test_names_of_turns_and_tokens_do_not_collide():
    assert not set(ESTIMATORS) & set(TOKEN_ESTIMATORS)
    assert set(NEEDS) <= set(ESTIMATORS)


def test_a_method_that_refuses_the_rollouts_is_left_out_with_a_note_unless_it_was_asked_for(tmp_path: Path, capsys):
    """Two rollouts share their first turn, where one ends: SLATE would pay that turn two outcomes."""
    path = tmp_path / "tree.jsonl"
    lines = [
        {"group": "q", "turns": [{"node": 0}], "outcome": {"right": 1}},
        {"group": "q", "turns": [{"node": 0}, {"node": 1}], "outcome": {"right": 0}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["credit", str(path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "slate is left out: the rollouts must suit slate; rollouts that share a turn must agree in its reward" in shown
    )
    assert "mt-grpo" in shown
    assert main(["credit", str(path), "--methods", "slate"]) == 2
    error = capsys.readouterr().err
    assert "to which the outcome is added in a rollout's last turn" in error
    assert error.count("\n") == 1
