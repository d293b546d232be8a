"""Rollouts that branch: every turn is drawn once, and every leaf is a rollout like any other."""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from turnwise.chat import byte_chat
from turnwise.config import TrainConfig
from turnwise.credit import mt_grpo, mt_grpo_tree, share_weights
from turnwise.crediting import rollout_table, training_rows
from turnwise.engine import Completion, Sampling, ScriptedEngine
from turnwise.engines.hf import HFEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.errors import ConfigError, InputError
from turnwise.evaluation import make_engine, rollout_limits
from turnwise.learning import update
from turnwise.policy import load_policy
from turnwise.rollout import Limits, run_groups, run_tree, run_trees, sampled_tokens
from turnwise.rundir import latest_checkpoint
from turnwise.setting import make_setting
from turnwise.tools import tool, tool_mapping
from turnwise.traces import read_traces, traces_table
from turnwise.training import train
from turnwise.types import Action, Message, Rollout, Task

CHAT = byte_chat()
TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi",))
LIMITS = Limits(max_turn_tokens=200, context=4000, max_turns=3)


async def search(query: str) -> str:
    """Passages about the query."""
    await asyncio.sleep(0.001 * (len(query) % 3))
    return f"About {query}."


TOOLS = tool_mapping([tool(search)])


def call(query: str) -> str:
    return f"<tool>{json.dumps({'name': 'search', 'args': {'query': query}})}</tool>"


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


class Varied:
    """An engine whose reply depends on the draw's seed alone, and which keeps what it was asked and released."""

    policy_version = 3

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = replies
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self.sessions: set[object] = set()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: object) -> Completion:
        self.sessions.add(session)
        await asyncio.sleep(0.0001 * (sampling.seed % 7))
        self.asked.append((tuple(prompt_ids), sampling.seed))
        text = f"{self.replies[sampling.seed % len(self.replies)]} {sampling.seed}"
        ids = (*CHAT.encode_text(text), CHAT.end_id)
        return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish="stop")

    def fork(self, session: object, into: object) -> None:
        assert session in self.sessions
        self.sessions.add(into)

    def release(self, session: object) -> None:
        self.sessions.discard(session)


def tree(engine, branches: Sequence[int], *, environment=None, max_turns: int = 3, **options) -> list[Rollout]:
    environment = environment or ToolEnvironment(TASK, TOOLS, max_turns=max_turns)
    job = run_tree(TASK, environment, engine, CHAT, branches=branches, limits=LIMITS, **options)
    return asyncio.run(asyncio.wait_for(job, 60))


# ---- the structure ----


def test_a_tree_of_two_by_three_has_six_leaves_and_draws_eight_turns():
    engine = ScriptedEngine([call("Kenya"), answer("Nairobi")], CHAT)
    leaves = tree(engine, (2, 3), group=5)
    assert [leaf.nodes for leaf in leaves] == [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7)]
    assert {(leaf.stop, leaf.answer, leaf.group) for leaf in leaves} == {("answer", "Nairobi", 5)}
    first, second = (len(leaves[0].turns[k].action_ids) for k in (0, 1))
    assert sampled_tokens(leaves) == 2 * first + 6 * second
    assert sampled_tokens([dataclasses.replace(leaf, nodes=()) for leaf in leaves]) == 6 * (first + second)


def test_a_shared_turn_is_one_record_that_was_drawn_once():
    engine = Varied([call("Kenya")])
    leaves = tree(engine, (2, 3, 2))
    assert len(leaves) == 12
    assert len(engine.asked) == 2 + 6 + 12
    assert len({seed for _, seed in engine.asked}) == 20, "every draw has a stream of its own"
    by_node: dict[int, list] = {}
    for leaf in leaves:
        for node, turn in zip(leaf.nodes, leaf.turns, strict=True):
            by_node.setdefault(node, []).append(turn)
    assert sorted(by_node) == list(range(20))
    assert all(turn is turns[0] for turns in by_node.values() for turn in turns)
    assert sorted(Counter(len(turns) for turns in by_node.values()).items()) == [(1, 12), (2, 6), (6, 2)]
    assert not engine.sessions, "all are released"


def test_every_leaf_is_the_conversation_that_the_engine_saw():
    engine = Varied([call("Kenya"), answer("x"), call("Peru")])
    leaves = tree(engine, (3, 2, 2))
    seen = {prompt for prompt, _ in engine.asked}
    for leaf in leaves:
        ids = leaf.prompt_ids
        for turn in leaf.turns:
            assert ids in seen
            ids = (*ids, *turn.action_ids, *turn.reply_ids)


def test_turns_beyond_the_branches_have_one_child():
    engine = Varied([call("Kenya")])
    leaves = tree(engine, (2,), max_turns=5)
    assert [leaf.nodes for leaf in leaves] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert {leaf.stop for leaf in leaves} == {"max_turns"}


def test_a_rollout_that_answers_early_is_one_leaf_among_deeper_ones():
    engine = Varied([call("Kenya"), answer("Nairobi")])
    leaves = tree(engine, (8, 2))
    sizes = Counter(len(leaf.turns) for leaf in leaves)
    firsts = {leaf.nodes[0]: leaf for leaf in leaves}
    early = sum(leaf.turns[0].action.answer is not None for leaf in firsts.values())
    assert 0 < early < 8
    assert len(firsts) == 8
    assert sizes[1] == early
    assert len(leaves) == early + 2 * (8 - early)
    table = rollout_table([scored(leaf, k) for k, leaf in enumerate(leaves)])
    assert share_weights(table).sum() == pytest.approx(len({n for leaf in leaves for n in leaf.nodes}))


def scored(leaf: Rollout, outcome: float) -> Rollout:
    return dataclasses.replace(
        leaf, turn_rewards=tuple({"r": 1.0} for _ in leaf.turns), outcome_rewards={"o": float(outcome)}
    )


@pytest.mark.parametrize("branches", [(), (2, 0), (True,), (1.5,)])
def test_branches_that_are_no_counts_are_refused(branches: tuple):
    with pytest.raises(ConfigError, match="branches must be whole numbers >= 1"):
        tree(ScriptedEngine([answer("x")], CHAT), branches)


# ---- seeds ----


def test_a_tree_that_branches_once_has_the_rollouts_of_a_group_of_chains():
    replies = [call("Kenya"), answer("x"), call("Peru"), "nothing"]
    make = lambda task: ToolEnvironment(task, TOOLS, max_turns=3)  # noqa: E731
    tasks = [TASK, dataclasses.replace(TASK, id="again")]
    options = {"limits": LIMITS, "seed": (7, 2)}
    chains = asyncio.run(run_groups(tasks, make, Varied(replies), CHAT, group_size=5, **options))
    for branches in ((5,), (5, 1), (5, 1, 1)):
        trees = asyncio.run(run_trees(tasks, make, Varied(replies), CHAT, branches=branches, **options))
        assert [[without_nodes(leaf) for leaf in leaves] for leaves in trees] == [
            [without_nodes(chain) for chain in group] for group in chains
        ]
    assert len({chain.turns[0].text for group in chains for chain in group}) == 10


def without_nodes(rollout: Rollout) -> Rollout:
    turns = tuple(
        dataclasses.replace(turn, results=tuple(dataclasses.replace(r, duration_s=0.0) for r in turn.results))
        for turn in rollout.turns
    )
    return dataclasses.replace(rollout, nodes=(), turns=turns)


def test_draws_depend_on_seed_and_path_alone():
    replies = [call("Kenya"), call("Peru")]

    def texts(branches: Sequence[int], seed: tuple[int, ...] = (0,)) -> list[list[str]]:
        return [[turn.text for turn in leaf.turns] for leaf in tree(Varied(replies), branches, seed=seed)]

    assert texts((3, 2)) == texts((3, 2))
    wide = texts((4, 3))
    assert texts((3, 2)) == [wide[i * 3 + j] for i in range(3) for j in range(2)]
    assert not {t for leaf in texts((3, 2), (1,)) for t in leaf} & {t for leaf in wide for t in leaf}


# ---- failures ----


class Fragile:
    """An environment in which a second message with an even length fails, and which cannot be copied later on."""

    def __init__(self, *, copies: bool = True, starts: bool = True) -> None:
        self.copies, self.starts, self.steps = copies, starts, 0

    def start(self) -> tuple[Message, ...]:
        if not self.starts:
            raise ConnectionError("refused")
        return (Message(role="user", content="go"),)

    async def step(self, text: str) -> Step:
        self.steps += 1
        if self.steps == 2 and text.startswith("bad"):
            raise ConnectionError("refused")
        return Step(
            action=Action(), reply=(Message(role="user", content="on"),), stop="answer" if self.steps == 2 else None
        )

    def fork(self) -> "Fragile":
        if self.steps and not self.copies:
            raise OSError("a socket\nis open")
        new = Fragile(copies=self.copies)
        new.steps = self.steps
        return new


def test_a_branch_that_fails_leaves_its_siblings_alone():
    leaves = tree(Varied(["bad", "good"]), (2, 6), environment=Fragile())
    assert len(leaves) == 12
    failed = [leaf for leaf in leaves if leaf.stop == "error"]
    assert 0 < len(failed) < 12
    for leaf in leaves:
        assert leaf.error == ("ConnectionError: refused" if leaf.turns[1].text.startswith("bad") else None)
        assert len(leaf.nodes) == 2


def test_a_copy_that_fails_is_recorded_with_the_turns_up_to_there():
    engine = Varied(["good"])
    leaves = tree(engine, (2, 3), environment=Fragile(copies=False))
    assert [(leaf.stop, leaf.nodes) for leaf in leaves] == [
        ("answer", (0, 1)),
        ("error", (0,)),
        ("error", (0,)),
        ("answer", (2, 3)),
        ("error", (2,)),
        ("error", (2,)),
    ]
    assert leaves[1].error == "a copy of the environment failed: OSError: a socket is open"
    assert leaves[1].turns[0] is leaves[0].turns[0]
    assert sampled_tokens(leaves) == sum(len(t.action_ids) for leaf in (leaves[0], leaves[3]) for t in leaf.turns)
    assert not engine.sessions


def test_an_environment_that_cannot_start_is_one_failed_rollout():
    (leaf,) = tree(Varied(["x"]), (4, 2), environment=Fragile(starts=False))
    assert (leaf.stop, leaf.error, leaf.turns, leaf.nodes) == ("error", "ConnectionError: refused", (), ())


def test_a_failing_engine_is_raised_as_itself_and_every_session_is_released():
    class Failing(Varied):
        async def generate(self, prompt_ids, sampling, *, session):
            if len(self.asked) >= 5:
                raise InputError("no more")
            return await super().generate(prompt_ids, sampling, session=session)

    engine = Failing([call("Kenya")])
    with pytest.raises(InputError, match="no more"):
        asyncio.run(
            run_trees([TASK] * 2, lambda t: ToolEnvironment(t, TOOLS), engine, CHAT, branches=(3, 2), limits=LIMITS)
        )
    assert not engine.sessions


# ---- with a model ----


class Refeeding(HFEngine):
    """Forks that copy nothing: every branch feeds its whole conversation."""

    def fork(self, session: object, into: object) -> None:
        pass


@pytest.fixture(scope="module")
def atlas():
    """The embedded policy, its questions and tools, with a few options of a small run."""
    config = TrainConfig()
    return config, load_policy("embedded"), make_setting(config)


def draw(atlas, engine, *, count: int = 3, **how) -> list[list[Rollout]]:
    config, policy, setting = atlas
    tasks = setting.train[:count]
    run = run_trees if "branches" in how else run_groups
    groups = asyncio.run(
        run(tasks, setting.environment, engine, policy.chat, limits=rollout_limits(config, policy), seed=(3, 0), **how)
    )
    return [[setting.scored(task, r) for r in group] for task, group in zip(tasks, groups, strict=True)]


def test_a_tree_of_forks_says_what_a_tree_that_feeds_everything_says(atlas):
    _, policy, _ = atlas
    engine = make_engine(policy)
    fed_again = Refeeding(policy.model, stop_ids=[policy.chat.end_id], max_context=policy.context)
    one, two = (draw(atlas, e, branches=(3, 3)) for e in (engine, fed_again))
    for leaves, others in zip(one, two, strict=True):
        assert [leaf.nodes for leaf in leaves] == [leaf.nodes for leaf in others]
        for leaf, other in zip(leaves, others, strict=True):
            for turn, its in zip(leaf.turns, other.turns, strict=True):
                assert turn.action_ids == its.action_ids
                assert turn.sampling_logprobs == pytest.approx(its.sampling_logprobs, abs=1e-5)
    assert max(len(leaf.nodes) for leaves in one for leaf in leaves) == 2
    assert engine.stats.prefilled_tokens < 0.7 * fed_again.stats.prefilled_tokens
    assert engine.stats.decoded_tokens == sum(sampled_tokens(leaves) for leaves in one)


def test_the_tree_form_of_mt_grpo_is_the_chain_form_where_only_first_turns_have_siblings(atlas):
    """Identity 26: K = 2 and the same siblings at turn 1."""
    _, policy, _ = atlas
    chains = [r for group in draw(atlas, make_engine(policy), group_size=8) for r in group]
    leaves = [r for group in draw(atlas, make_engine(policy), branches=(8, 1)) for r in group]
    assert [without_nodes(leaf) for leaf in leaves] == [without_nodes(chain) for chain in chains]
    chain, branched = rollout_table(chains), rollout_table(leaves)
    assert (chain.node, set(np.bincount(branched.index))) == (None, set(np.bincount(chain.index)))
    credit = mt_grpo_tree(branched)
    assert np.abs(credit.advantages).max() > 0.5
    np.testing.assert_allclose(credit.advantages, mt_grpo(chain).advantages, atol=1e-12)
    rows = training_rows(leaves, branched, credit)
    assert all(row.share == 1 / 8 for _, row in rows)


def test_the_loss_counts_each_leaf_by_the_draws_that_led_to_it(atlas):
    """At the sampling policy all ratios are 1: loss = − Σ over leaves of w · mean over the leaf's tokens of A.

    w = 1/3 for a rollout that ended with one of the three first turns, 1/9 for one of the three that went on from it.
    """
    _, _, setting = atlas
    policy = load_policy("embedded")
    (leaves,) = draw((TrainConfig(), policy, setting), make_engine(policy), count=1, branches=(3, 3))
    leaves = [r for r in leaves if r.stop != "error"]
    assert {len(leaf.turns) for leaf in leaves} == {1, 2}
    table = rollout_table(leaves)
    credit = mt_grpo_tree(table)
    advantages = iter(credit.advantages)
    expected = 0.0
    for leaf in leaves:
        tokens = [len(turn.action_ids) for turn in leaf.turns]
        expected -= sum(n * next(advantages) for n in tokens) / sum(tokens) / 3 ** len(leaf.turns)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    config = TrainConfig(estimator="mt-grpo-tree", branches=(3, 3), minibatches=1)
    metrics = update(policy, optimizer, training_rows(leaves, table, credit), config, 0)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3


# ---- training ----

SMALL = {
    "branches": (3, 2),
    "steps": 2,
    "tasks_per_step": 2,
    "minibatches": 1,
    "validation_size": 2,
    "validate_every": 100,
    "checkpoint_every": 1,
    "threads": 1,
}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(run: Path) -> list[dict[str, float]]:
    """The numbers of the training steps, without clock times."""
    times = ("tokens_per_s", "rollout_s", "update_s")
    records = [r["metrics"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"]
    return [{name: value for name, value in record.items() if name not in times} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tree"
    train(**SMALL, estimator="mt-grpo-tree", out=out)
    return out


def test_mt_grpo_tree_trains_the_embedded_policy(whole: Path):
    first, second = trained(whole)
    assert first["grad_norm"] > 0
    assert first["policy_shift"] < 1e-5
    records = [r for r in lines(whole / "rollouts.jsonl") if r["step"] == 1]
    drawn = {}
    for record in records:
        rollout = record["rollout"]
        for node, turn in zip(rollout["nodes"], rollout["turns"], strict=True):
            drawn[rollout["group"], node] = len(turn["action_ids"])
    assert len(records) > 6, "some first turns have two second ones"
    assert first["sampled_tokens"] == sum(drawn.values())
    assert second["sampled_tokens"] > first["sampled_tokens"]
    assert latest_checkpoint(whole)[1]["sampled_tokens"] == second["sampled_tokens"]


@pytest.mark.parametrize("estimator", ["treerl", "carl", "tree-grpo", "slate"])
def test_the_other_tree_methods_train_from_the_same_rollouts(whole: Path, tmp_path: Path, estimator: str):
    train(**{**SMALL, "steps": 1, "estimator": estimator}, out=tmp_path / "run")
    assert trained(tmp_path / "run")[0]["sampled_tokens"] == trained(whole)[0]["sampled_tokens"]
    assert trained(tmp_path / "run")[0]["grad_norm"] > 0


def test_recorded_trees_are_read_with_their_nodes(whole: Path):
    table = traces_table([t for t in read_traces(whole / "rollouts.jsonl") if t.group[0] == 1])
    assert table.node is not None
    assert len(np.unique(table.node)) < len(table.node)
    assert mt_grpo_tree(table).advantages.std() > 0


@pytest.mark.parametrize(("spare", "steps"), [(-1, 1), (0, 1), (1, 2)])
def test_a_run_ends_with_the_step_that_reaches_its_budget(whole: Path, tmp_path: Path, spare: int, steps: int):
    budget = int(trained(whole)[0]["sampled_tokens"]) + spare
    out = tmp_path / "run"
    result = train(**{**SMALL, "steps": 50}, estimator="mt-grpo-tree", token_budget=budget, out=out)
    assert (result.steps, result.finished) == (steps, True)
    assert trained(out) == trained(whole)[:steps]
    assert lines(out / "metrics.jsonl")[-1]["split"] == "validation"
    assert train(out=out, resume=True).steps == steps, "a budget that is spent stays spent"


def test_a_resumed_run_counts_on_to_the_same_budget(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    budget = int(trained(whole)[1]["sampled_tokens"])

    class Crash:
        def show(self, record: dict) -> None:
            if record["step"] == 2:
                raise ZeroDivisionError("power cut")

    with pytest.raises(ZeroDivisionError):
        train(**{**SMALL, "steps": 50}, estimator="mt-grpo-tree", token_budget=budget, out=out, display=Crash())
    assert train(out=out, resume=True).steps == 2
    assert trained(out) == trained(whole)


def test_turn_rewards_that_differ_between_rollouts_of_one_turn_are_refused(tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        "def turn_late(task, rollout):\n    return [float(len(rollout.turns[-1].text)) for turn in rollout.turns]\n"
    )
    with pytest.raises(InputError, match="must suit mt-grpo-tree: rollouts that share a turn must agree") as caught:
        train(
            **{**SMALL, "branches": (3, 6)},
            estimator="mt-grpo-tree",
            rewards=tmp_path / "rewards.py",
            out=tmp_path / "run",
        )
    assert "\n" not in str(caught.value)
