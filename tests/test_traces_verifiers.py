"""Traces of verifiers 0.4: read as turns, and credit written back per sampled token.

`fixtures/verifiers.jsonl` was made with the package's own classes (`Trace.to_record`): rollout a searches and answers
rightly, b searches twice and answers wrongly; two or three tokens are sampled in a node.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from turnwise.cli import main
from turnwise.errors import InputError
from turnwise.traces import read_traces, recorded_credit, traces_credit, traces_table, verifiers_lines

FILE = Path(__file__).parent / "fixtures" / "verifiers.jsonl"


def changed(tmp_path: Path, change) -> Path:
    records = [json.loads(line) for line in FILE.read_text().splitlines()]
    change(records)
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_sampled_messages_are_turns_and_rewards_the_outcome():
    a, b = read_traces(FILE)
    assert (a.id, a.group, a.outcome, b.outcome) == ("a", "kenya", {"right": 1.0}, {"right": 0.0})
    assert [turn.text for turn in a.turns] == ['search({"query": "Kenya"})', "Nairobi"]
    assert [turn.tokens for turn in b.turns] == [3, 2, 3]
    assert [turn.rewards for turn in b.turns] == [{"found": 0.0}, {"found": 0.5}, {}]
    assert recorded_credit([a, b]) is None


def test_turns_after_equal_messages_are_in_one_state():
    a, b = read_traces(FILE)
    assert a.turns[0].anchor == b.turns[0].anchor  # the question
    assert a.turns[1].anchor == b.turns[2].anchor  # the same result, of calls with other ids
    assert b.turns[1].anchor != b.turns[2].anchor


def test_credit_is_written_to_every_sampled_token_and_nothing_else_is_changed():
    traces = read_traces(FILE)
    expected = traces_credit("mt-grpo", traces, traces_table(traces))
    written = [json.loads(line) for line in verifiers_lines(FILE, "mt-grpo")]
    nodes = [node for record in written for node in record["nodes"]]
    sampled = [node for node in nodes if node["sampled"]]
    assert all(node["advantages"] is None for node in nodes if not node["sampled"])
    assert all(len(node["advantages"]) == sum(node["mask"]) == len(node["logprobs"]) for node in sampled)
    np.testing.assert_allclose([node["advantages"][0] for node in sampled], expected)
    for node in sampled:
        assert len(set(node["advantages"])) == 1
        node["advantages"] = None
    assert written == [json.loads(line) for line in FILE.read_text().splitlines()]


def test_the_command_shows_and_writes_and_reads_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "credited.jsonl"
    assert main(["credit", str(FILE), "--methods", "turn-rloo", "--write", str(out)]) == 0
    assert "2 traces with the credit of turn-rloo" in capsys.readouterr().out
    traces = read_traces(out)
    recorded = recorded_credit(traces)
    assert recorded is not None
    np.testing.assert_allclose(recorded, traces_credit("turn-rloo", traces, traces_table(traces)))
    assert main(["credit", str(out)]) == 0
    assert "recorded" in capsys.readouterr().out


def test_only_one_method_is_written_and_only_into_traces_of_verifiers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["credit", str(FILE), "--write", str(tmp_path / "x")]) == 2
    assert "methods must be one where its credit is written; got 0" in capsys.readouterr().err
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"group": "q", "turns": [{}], "outcome": {"right": 1}}\n')
    with pytest.raises(InputError, match="rollout 1 is none"):
        verifiers_lines(plain, "grpo-or")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[0]["nodes"][1].update(mask=[]), "node 1 must have a mask of its sampled tokens"),
        (lambda r: r[0]["nodes"][1].update(advantages=[1.0]), "advantages must be a list of a number for each of 3"),
        (lambda r: r[0]["info"].update(turn_rewards=[None]), "turn_rewards must be one per sampled node, 2; got 1"),
        (lambda r: r[1]["nodes"][1].pop("message"), "must be a trace of verifiers; KeyError: 'message'"),
        (lambda r: r[1].update(rewards={"right": 3}), "must be a trace of verifiers; TypeError"),
        (lambda r: r[1]["nodes"][1].update(parent=99), "must be a trace of verifiers; IndexError"),
    ],
)
def test_broken_traces_are_refused_with_their_place(tmp_path: Path, change, message: str):
    with pytest.raises(InputError, match=message):
        read_traces(changed(tmp_path, change))


@pytest.mark.slow
def test_the_package_reads_what_was_written():
    trace = pytest.importorskip("verifiers.v1.trace", reason="needs verifiers 0.4")
    first, _ = [trace.WireTrace.model_validate_json(line) for line in verifiers_lines(FILE, "mt-grpo")]
    [branch] = first.branches
    assert len(branch.advantages) == len(branch.token_ids)
    assert all((a != 0) <= sampled for a, sampled in zip(branch.advantages, branch.sampled_mask, strict=True))
    assert any(branch.advantages)
