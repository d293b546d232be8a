"""Recorded rollouts to a turn table: the plain format, a run's own, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from report_runs import write_run
from turnwise.errors import InputError
from turnwise.traces import lacking, read_traces, traces_table

PLAIN = [
    {
        "group": "q",
        "id": "a",
        "turns": [
            {"rewards": {"found": 0.5}, "text": "search", "tokens": 3, "value": 0.25, "anchor": "s", "node": 0},
            {},
        ],
        "outcome": {"right": 1},
        "bootstrap": 0.5,
    },
    {"group": "p", "turns": [{"tokens": 2, "value": 0, "anchor": 7, "node": 1}]},
]


def written(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def test_plain_lines_become_the_table(tmp_path: Path):
    traces = read_traces(written(tmp_path, *PLAIN, {"group": "q", "turns": [{}]}))
    assert [t.id for t in traces] == ["a", "rollouts.jsonl:2", "rollouts.jsonl:3"]
    assert traces[0].turns[0].text == "search"
    table = traces_table(traces)
    assert_array_equal(table.group, [0, 0, 1, 0])
    assert_array_equal(table.rollout, [0, 0, 1, 2])
    assert_array_equal(table.turn_rewards["found"], [0.5, np.nan, np.nan, np.nan])
    assert_array_equal(table.outcome_rewards["right"], [1, np.nan, np.nan])
    assert_array_equal(table.bootstrap, [0.5, 0, 0])
    assert table.values is None  # not all turns have one


def test_columns_that_all_turns_have_are_there(tmp_path: Path):
    table = traces_table(read_traces(written(tmp_path, {**PLAIN[0], "turns": PLAIN[0]["turns"][:1]}, PLAIN[1])))
    assert_array_equal(table.values, [0.25, 0])
    assert_array_equal(table.tokens, [3, 2])
    assert_array_equal(table.anchor, [0, 1])
    assert_array_equal(table.node, [0, 1])


def test_a_runs_own_rollouts_are_read_as_they_are(tmp_path: Path):
    run = write_run(tmp_path / "run", estimator="mt-grpo", seed=0)
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    table = traces_table(read_traces(run / "rollouts.jsonl"))
    assert table.num_rollouts == len(lines)
    assert table.tokens is not None
    for i, line in enumerate(lines):
        rewards = line["rollout"]["turn_rewards"]
        assert table.turn_reward()[table.rollout == i].tolist() == [sum(turn.values()) for turn in rewards]
        assert table.outcome_reward()[i] == pytest.approx(sum(line["rollout"]["outcome_rewards"].values()))
    same = {(line["step"], line["rollout"]["group"]) for line in lines}
    assert len(np.unique(table.group)) == len(same)


def test_a_runs_values_of_tokens_are_cut_into_its_turns(tmp_path: Path):
    run = write_run(tmp_path / "run", estimator="mt-ppo", seed=0)
    line = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    counts = [len(turn["action_ids"]) for turn in line["rollout"]["turns"]]
    line |= {"token_values": [*range(sum(counts))], "baselines": {"value": [7.0 + k for k in range(len(counts))]}}
    (trace,) = read_traces(written(tmp_path, line))
    assert [turn.token_values[0] for turn in trace.turns] == [sum(counts[:k]) for k in range(len(counts))]
    assert [len(turn.token_values) for turn in trace.turns] == counts
    assert [turn.value for turn in trace.turns] == [7.0 + k for k in range(len(counts))]
    assert lacking("mt-ppo", [trace]) == lacking("vetta", [trace]) == lacking("turn-ppo", [trace]) == []
    for wrong in (line["token_values"][1:], [*line["token_values"][1:], "x"], 3):
        with pytest.raises(InputError, match="jsonl:1: token_values must be"):
            read_traces(written(tmp_path, {**line, "token_values": wrong}))


def test_a_half_written_last_line_is_skipped_and_one_elsewhere_refused(tmp_path: Path):
    whole = {"group": "q", "turns": [{}]}
    with pytest.warns(UserWarning, match=r"rollouts\.jsonl:2: a half-written last line was skipped"):
        assert len(read_traces(written(tmp_path, whole, '{"group": "q", "tu'))) == 1
    with pytest.raises(InputError, match="jsonl:2: each line must be one JSON object"):
        read_traces(written(tmp_path, whole, '{"group": "q", "tu', whole))
    with pytest.raises(InputError, match="jsonl:2: each line must be one JSON object; got 5"):
        read_traces(written(tmp_path, whole, "5"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "each line must be one JSON object"),
        ({"turns": [{}]}, "rollouts.jsonl:1: group must be a text or a whole number; got null"),
        ({"group": "q", "turns": []}, "turns must be a list of at least one turn"),
        ({"group": "q", "turns": [3]}, "turn 0: a turn must be a JSON object; got 3"),
        ({"group": "q", "turns": [{}, {"reward": 1}]}, "turn 1 must have fields of rewards, .* got 'reward'"),
        ({"group": "q", "turns": [{"rewards": {"a": "x"}}]}, 'a must be a finite number within .*; got "x"'),
        ({"group": "q", "turns": [{"rewards": [1]}]}, "must be an object of names and numbers"),
        ({"group": "q", "turns": [{"tokens": 0}]}, "tokens must be a whole number of at least 1; got 0"),
        ({"group": "q", "turns": [{"anchor": [1]}]}, "anchor must be a text or a whole number"),
        ('{"group": "q", "turns": [{"value": NaN}]}', "value must be a finite number within .*; got NaN"),
        ({"group": "q", "turns": [{}], "outcom": {}}, "got 'outcom'"),
        ({"group": True, "turns": [{}]}, "group must be a text or a whole number; got true"),
        ({"group": "q", "turns": [{"anchor": False}]}, "anchor must be a text or a whole number; got false"),
        ({"group": "q", "turns": [{"token_values": []}]}, "token_values must be a list of a number for each"),
        ({"group": "q", "turns": [{"token_values": [1], "tokens": 2}]}, "as many numbers as tokens, 2; got 1"),
        ({"group": "q", "turns": [{"token_values": ["x"]}]}, "token_values must be a finite number"),
        (
            {"rollout": {}, "step": 1},
            "jsonl:1 must be a rollout that a run recorded; its rollout has no field 'task_id'",
        ),
        ({"rollout": {}}, "jsonl:1 must be a rollout that a run recorded; its line has no field 'step'"),
        ({"rollout": None, "step": 1}, "jsonl:1: rollout must be a JSON object; got null"),
    ],
)
def test_what_is_no_rollout_is_refused_with_line_and_field(record: object, words: str, tmp_path: Path):
    with pytest.raises(InputError, match=words) as caught:
        read_traces(written(tmp_path, record))
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="it is empty"):
        read_traces(written(tmp_path))


def test_nodes_are_named_within_their_group_and_must_agree(tmp_path: Path):
    two = [{"group": g, "turns": [{"node": "a"}, {"node": "b"}]} for g in ("p", "q")]
    assert len(set(traces_table(read_traces(written(tmp_path, *two))).node.tolist())) == 4
    torn = {"group": "p", "turns": [{"node": "a"}, {"node": "a"}]}
    with pytest.raises(InputError, match="must make a turn table; rows of one tree node"):
        traces_table(read_traces(written(tmp_path, torn)))


@pytest.mark.parametrize("value", [1e200, int("9" * 400)])
def test_numbers_whose_squares_are_none_are_refused(value: float, tmp_path: Path):
    with pytest.raises(InputError, match="a must be a finite number within"):
        read_traces(written(tmp_path, {"group": "q", "turns": [{"rewards": {"a": value}}]}))
