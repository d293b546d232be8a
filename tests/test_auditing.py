"""True advantages by rollouts that are played on: exact where the engine is, near the exact ones where it draws."""

import asyncio
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from lab_play import ProcessEngine, environments
from turnwise.auditing import agreement, audit, audited, drawn_advantages
from turnwise.chat import byte_chat
from turnwise.cli import main
from turnwise.engine import ScriptedEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.lab import PROBLEMS, solve
from turnwise.rewards import score
from turnwise.rollout import Limits, run_groups, run_rollout
from turnwise.tools import tool, tool_mapping
from turnwise.truth import GroupReturns, group_returns, total_return
from turnwise.types import Action, Message, Rollout, Task

CHAT = byte_chat()
TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi",))
LIMITS = Limits(max_turn_tokens=200, context=4000, max_turns=3)
WEIGHTS = {"tool_execution": 0.2, "exact_match": 1.0}
SEARCH = '<tool>{"name": "search", "args": {"query": "Kenya"}}</tool>'


@tool
def search(query: str) -> str:
    """Passages about the query."""
    return f"About {query}: Nairobi."


def tools_environment(task: Task) -> ToolEnvironment:
    return ToolEnvironment(task, tool_mapping([search]), max_turns=3)


def scored(task: Task, rollout: Rollout) -> Rollout:
    return score(task, rollout, WEIGHTS)


def scripted(*replies: str) -> ScriptedEngine:
    return ScriptedEngine(list(replies), CHAT)


def played(*replies: str) -> Rollout:
    return asyncio.run(run_rollout(TASK, tools_environment(TASK), scripted(*replies), CHAT, limits=LIMITS))


def returns(rollouts: list[Rollout], engine, make=tools_environment, **options) -> GroupReturns:
    options = {"scored": scored, "limits": LIMITS, "continuations": 3, **options}
    return asyncio.run(group_returns(TASK, rollouts, make, engine, CHAT, **options))


def advantages(found: GroupReturns) -> tuple[np.ndarray, np.ndarray]:
    return drawn_advantages([dataclasses.asdict(turn) for turns in found.turns for turn in turns])


# ---- exact ----


def told(prompt: str) -> str:
    """A policy that searches once and answers right then."""
    return "<answer>Nairobi</answer>" if "About" in prompt else SEARCH


def test_a_scripted_engine_gives_exact_advantages():
    engine = ScriptedEngine(told, CHAT)
    # The policy earns .2 for its search and 1 for its answer, 1.2 from the question on and 1.2 in all after the search.
    own, hasty, idle, wrong = (
        played(SEARCH, "<answer>Nairobi</answer>"),  # what the policy does:                          0, 0
        played("<answer>Nairobi</answer>"),  # right at once, 1 - 1.2:                               -.2
        played("Hm."),  # no call and no answer, 0 - 1.2:                                             -1.2
        played(SEARCH, "<answer>Mombasa</answer>"),  # searches as the policy does, then .2 - 1.2:    0, -1
    )
    found = returns([own, hasty, idle, wrong], engine)
    advantage, error = advantages(found)
    assert_allclose(advantage, [0, 0, -0.2, -1.2, 0, -1.0], atol=1e-12)
    assert_allclose(error, 0)
    assert {len(side) for turns in found.turns for turn in turns for side in (turn.before, turn.after)} == {3}


def test_a_state_is_played_on_from_once_and_its_tokens_are_counted():
    engine = ScriptedEngine(told, CHAT)
    once = played(SEARCH, "<answer>Nairobi</answer>")
    found = returns([once, once], engine)
    first, second = (len(turn.action_ids) for turn in once.turns)
    # from the question 3 rollouts of two turns, from the search taken again 3 answers, which are those from the next
    # state too, and the answer taken again 3 times, which draws nothing
    assert found.continuations == 9
    assert found.tokens == 3 * (first + second) + 3 * second
    assert found.turns[0] == found.turns[1]
    assert found.turns[0][0].after == found.turns[0][1].before
    assert found.strayed == 0


def test_a_turn_that_was_cut_off_is_cut_off_again():
    limits = dataclasses.replace(LIMITS, max_turn_tokens=10)
    engine = scripted("Nairobi, Nairobi, Nairobi")
    rollout = asyncio.run(run_rollout(TASK, tools_environment(TASK), engine, CHAT, limits=limits))
    assert rollout.stop == "max_tokens"
    found = returns([rollout], ScriptedEngine(lambda prompt: "<answer>Nairobi</answer>", CHAT))
    assert found.turns[0][0].before == (1.0,) * 3
    assert found.turns[0][0].after == (0.0,) * 3


class Forgetful:
    """An environment that answers everything by a number of its own."""

    made = 0

    def start(self) -> tuple[Message, ...]:
        return (Message(role="user", content=TASK.question),)

    async def step(self, text: str) -> Step:
        type(self).made += 1
        if text == "end":
            return Step(action=Action(answer="Nairobi"), stop="answer", rewards={"environment": 1.0})
        return Step(action=Action(), reply=(Message(role="user", content=str(self.made)),))


def test_an_environment_that_answers_otherwise_each_time_is_counted():
    rollout = asyncio.run(run_rollout(TASK, Forgetful(), scripted("go", "end"), CHAT, limits=LIMITS))
    engine = ScriptedEngine(lambda prompt: "end", CHAT)
    found = returns([rollout], engine, lambda task: Forgetful())
    assert found.strayed == 2, "before the second turn, once for other turns and once for itself"
    assert returns([rollout], engine, lambda task: Forgetful(), forks=False).strayed > 2, "each copy by itself"


class Broken(Forgetful):
    """An environment that fails when its rollout goes on."""

    async def step(self, text: str) -> Step:
        raise RuntimeError("gone")


def test_rollouts_in_which_the_environment_fails_are_left_out():
    rollout = asyncio.run(run_rollout(TASK, Forgetful(), scripted("end"), CHAT, limits=LIMITS))
    found = returns([rollout], scripted("go"), lambda task: Broken())
    assert found.turns[0][0].before == found.turns[0][0].after == ()
    assert np.isnan(advantages(found)[0]).all()


def test_rollouts_of_another_setting_are_refused():
    rollout = dataclasses.replace(played("Hm."), prompt_ids=(1, 2, 3))
    with pytest.raises(InputError, match="must begin as their environment does"):
        returns([rollout], scripted("Hm."))
    with pytest.raises(ConfigError, match="continuations must be >= 2"):
        returns([played("Hm.")], scripted("Hm."), continuations=1)


# ---- an exactly solvable process ----


@pytest.mark.parametrize("name", ["stochastic-tool", "ragged", "stop-or-go"])
def test_the_truth_of_a_process_is_found_without_bias(name: str):
    process, logits = PROBLEMS[name]()
    engine, make = ProcessEngine(process, logits, CHAT), environments(process, 1)
    limits = Limits(max_turn_tokens=40, context=4000, max_turns=process.max_turns)
    options = {"limits": limits, "seed": (0,)}
    [group] = asyncio.run(run_groups([TASK], make, engine, CHAT, group_size=8, **options))
    solution = solve(process, logits)
    exact = np.array(
        [
            solution.advantage[k, s := process.states.index(state), process.actions[s].index(turn.text)]
            for rollout in group
            for k, (turn, state) in enumerate(zip(rollout.turns, rollout.states, strict=True))
        ]
    )

    def paid(task: Task, rollout: Rollout) -> Rollout:
        return dataclasses.replace(rollout, turn_rewards=tuple(turn.rewards for turn in rollout.turns))

    errors = {}
    for n in (10, 160):
        found = returns(group, engine, make, scored=paid, continuations=n, **options)
        drawn, error = advantages(found)
        errors[n] = np.sqrt(np.mean(error**2))
    assert found.strayed == 0
    score_of = (drawn - exact)[error > 0] / error[error > 0]
    assert_allclose(drawn[error == 0], exact[error == 0], atol=1e-9)
    assert len(np.unique(exact.round(9))) > 2
    assert np.abs(score_of).max() < 4
    assert np.sqrt(np.mean(score_of**2)) < 1.8
    # sixteen times as many rollouts: a quarter of the error
    assert errors[160] == pytest.approx(errors[10] / 4, rel=0.35)


# ---- arithmetic ----


def test_advantage_and_error_of_returns():
    # mean 2 - mean 1 = 1;  Var after = 2 over 2, Var before = 1 over 3:  s² = 1 + 1/3
    turns = [{"before": [0, 1, 2], "after": [1, 3]}, {"before": [1], "after": [1, 2]}]
    drawn, error = drawn_advantages(turns)
    assert drawn[0] == 1
    assert error[0] == pytest.approx(math.sqrt(4 / 3))
    assert np.isnan(drawn[1])


def test_measures_by_hand():
    truth, error = np.array([3.0, 1.0, -1.0, -2.0]), np.full(4, 0.4)
    credit = {
        "same": truth,
        "swapped": np.array([1.0, 3.0, -1.0, -2.0]),  # ranks differ by 1 twice: 1 - 6 · 2 / (4 · 15) = .8
        "opposite": -truth,
        "first": np.array([1.0, 0.0, 0.0, 0.0]),  # one of four signs
        "alike": np.zeros(4),
    }
    found, ceiling = agreement(credit, truth, error, [0, 0, 1, 1])
    ranks = {name: one.rank_correlation and round(one.rank_correlation.value, 9) for name, one in found.items()}
    assert ranks == {"same": 1, "swapped": 0.8, "opposite": -1, "first": round(math.sqrt(0.6), 9), "alike": None}
    signs = {name: one.sign_agreement and one.sign_agreement.value for name, one in found.items()}
    assert signs == {"same": 1, "swapped": 1, "opposite": 0, "first": 0.25, "alike": 0}
    # Var of 3, 1, -1, -2 is 15/4 - 1/16 = 3.6875; the noise's is .16
    assert ceiling is not None
    assert ceiling.value == pytest.approx(math.sqrt(1 - 0.16 / 3.6875))


def test_a_truth_within_its_noise_has_no_sign():
    truth, error = np.array([1.0, -0.1, 0.0]), np.array([0.4, 0.06, 0.0])
    found, _ = agreement({"up": np.ones(3)}, truth, error, [0, 1, 2])
    # 1 is 2.5 errors from 0, -.1 only 1.7, and 0 has no sign
    assert found["up"].sign_agreement is not None
    assert found["up"].sign_agreement.value == 1.0


def test_intervals_are_over_groups():
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.normal(size=40), 5)
    credit = truth + np.repeat(rng.normal(size=40), 5)
    within, _ = agreement({"c": credit}, truth, np.zeros(200), list(range(200)))
    over, _ = agreement({"c": credit}, truth, np.zeros(200), np.repeat(np.arange(40), 5).tolist())
    narrow, wide = within["c"].rank_correlation, over["c"].rank_correlation
    assert narrow
    assert wide
    assert narrow.value == wide.value
    # turns of a group are alike: intervals over groups are some √5 as wide as those over turns
    assert 1.6 < (wide.high - wide.low) / (narrow.high - narrow.low) < 3.0


def test_a_noisy_truth_correlates_as_its_ceiling_says():
    rng = np.random.default_rng(1)
    truth, error = rng.normal(size=4000), np.ones(4000)
    _, ceiling = agreement({}, truth + rng.normal(size=4000), error, list(range(4000)))
    assert ceiling is not None
    assert ceiling.value == pytest.approx(math.sqrt(0.5), abs=0.02)
    noise = agreement({}, rng.normal(size=50), np.full(50, 3.0), list(range(50)))[1]
    assert noise is not None
    assert noise.value == 0


# ---- runs ----

SMALL = {"groups": 2, "group_size": 3, "continuations": 2}


def test_an_audit_goes_on_where_it_stopped_and_takes_saved_rollouts(tmp_path: Path):
    first = audit(methods=("mt-grpo", "grpo-or"), out=tmp_path, **SMALL)
    assert list(first.estimators) == ["mt-grpo", "grpo-or"]
    assert (first.groups, first.rollouts) == (2, 6)
    assert first.tokens > 0
    whole = (tmp_path / "audit.jsonl").read_text()
    lines = whole.splitlines()
    (tmp_path / "audit.jsonl").write_text("\n".join([*lines[:2], lines[2][:50]]))
    said: list[str] = []
    again = audit(methods=("mt-grpo", "grpo-or"), out=tmp_path, say=said.append, **SMALL)
    assert said[0] == "1 of 2 groups are there already"
    assert again == first
    assert (tmp_path / "audit.jsonl").read_text() == whole
    assert json.loads((tmp_path / "audit.json").read_text())["tokens"] == first.tokens
    with pytest.raises(RunError, match="must be of this audit"):
        audit(out=tmp_path, **{**SMALL, "continuations": 3})
    records = [record for line in lines[1:] for record in json.loads(line)["rollouts"]]
    for record in records:
        record["advantages"] = [1.0 + k for k in range(len(record["rollout"]["turns"]))]
    saved = tmp_path / "rollouts.jsonl"
    saved.write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
    task = {**records[0], "rollout": {**records[0]["rollout"], "task_id": "nobody's"}}
    (tmp_path / "others.jsonl").write_text(json.dumps(task) + "\n")
    with pytest.raises(InputError, match="must be of the run's tasks"):
        audit(rollouts=tmp_path / "others.jsonl", **SMALL)
    [(_, one)] = audit(rollouts=saved, methods=("recorded",), continuations=2).estimators.items()
    assert one is not None


def group_line(*rollouts: Rollout) -> dict:
    records = [{"step": 0, "rollout": json.loads(scored(TASK, one).to_json())} for one in rollouts]
    found = returns(list(rollouts), ScriptedEngine(told, CHAT))
    return {"group": 0, "rollouts": records, **dataclasses.asdict(found)}


def test_methods_that_cannot_take_the_rollouts_are_said_or_refused():
    lines = [group_line(played(SEARCH, "<answer>Nairobi</answer>"), played("Hm."))]
    found = audited(lines, ("mt-grpo", "turn-ppo"), only=False)
    assert list(found.estimators) == ["mt-grpo"]
    assert any("turn-ppo is left out: rollouts must have value" in note for note in found.notes)
    for name in ("turn-ppo", "recorded"):
        with pytest.raises(InputError, match="rollouts must"):
            audited(lines, (name,))
    # truth 0, 0 and -1.2; mt-grpo's credit of "Hm." is the lowest
    agreed = found.estimators["mt-grpo"]
    assert agreed.sign_agreement is not None
    assert agreed.sign_agreement.value == 1
    assert found.ceiling is not None
    assert found.ceiling.value == 1
    assert total_return(scored(TASK, played("Hm."))) == 0


def test_options_that_cannot_be_are_one_line(capsys, tmp_path: Path):
    for args, said in (
        (("--methods", "mt-grpoo"), "mt-grpo"),
        (("--continuations", "1"), "continuations must be >= 2"),
        (("--groups", "0"), "groups must be >= 1"),
        (("--name", "../x"), "name must be"),
        (("--out", str(tmp_path / "none")), "out must be a folder"),
        (("--rollouts", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("--rollouts", "x.jsonl", "--split", "test"), "tasks and split must be left out"),
    ):
        assert main(["audit", "embedded", *args]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
