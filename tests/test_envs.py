"""Environments from elsewhere: what they pay becomes rewards, and where they come from is checked before any work."""

import asyncio
import dataclasses
import json
import math
from pathlib import Path

import pytest

from turnwise import atlas, credit
from turnwise.chat import byte_chat
from turnwise.cli import main
from turnwise.config import TrainConfig
from turnwise.crediting import credit_rollouts, rollout_table
from turnwise.engine import ScriptedEngine
from turnwise.env import Step, TurnLimit
from turnwise.envs import load_source
from turnwise.envs.source import Source, read_action, seed_tasks
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.evaluation import evaluate, mean_metrics, rollout_metrics, rollouts
from turnwise.report.data import load_run
from turnwise.report.rollouts import outcome_of
from turnwise.report.tables import COLUMNS, ELSEWHERE, Cell, Row, columns_of, markdown_table
from turnwise.rewards import score
from turnwise.rollout import Limits, run_rollout, run_tree
from turnwise.setting import make_setting
from turnwise.tasks import load_tasks
from turnwise.training import rating, train
from turnwise.types import Action, Message, Rollout, Task, Turn, rollout_from_json

CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=60, context=4000, max_turns=4)
TASK = Task(id="seed-3", question="seed 3", metadata={"seed": 3})


class Corridor:
    """Fields 0 to 3 in a row: a step right is paid .5, one left -.25; other words are not paid. Field 3 is the end."""

    def __init__(self, task: Task) -> None:
        self.place = task.metadata.get("start", 0)
        self.closed = 0

    def start(self):
        return (Message(role="user", content=f"field {self.place}"),)

    async def step(self, text: str) -> Step:
        if text == "burn":
            raise RuntimeError("on fire")
        move = {"right": 1, "left": -1}.get(text, 0)
        self.place = max(0, self.place + move)
        done = self.place == 3
        rewards = {} if move == 0 else {"environment": 0.5 if move > 0 else -0.25}
        return Step(
            action=Action(),
            reply=(Message(role="user", content=f"field {self.place}"),),
            rewards=rewards if text != "nan" else {"environment": math.nan},
            stop="done" if done else None,
            success=done if done else None,
        )

    def state_key(self) -> str:
        return str(self.place)

    async def close(self) -> None:
        self.closed += 1


def played(*replies: str, task: Task = TASK, limits: Limits = LIMITS, environment=None) -> Rollout:
    environment = environment or Corridor(task)
    return asyncio.run(run_rollout(task, environment, ScriptedEngine(list(replies), CHAT), CHAT, limits=limits))


# ------------------------------------------------------------------------------- the records


def test_what_the_environment_pays_is_recorded_and_read_back():
    rollout = played("right", "wait", "left", "right", "right", "right")
    assert [dict(turn.rewards) for turn in rollout.turns] == [
        {"environment": 0.5},
        {},
        {"environment": -0.25},
        *[{"environment": 0.5}] * 3,
    ]
    assert (rollout.stop, rollout.success, rollout.terminated) == ("done", True, True)
    assert rollout.states == ("0", "1", "1", "0", "1", "2")
    assert rollout_from_json(rollout.to_json()) == rollout


def test_records_of_before_there_were_environment_rewards_can_be_read():
    data = json.loads(played("right", "right", "right").to_json())
    for turn in data["turns"]:
        del turn["rewards"]
    del data["states"], data["success"]
    old = rollout_from_json(json.dumps(data))
    assert (old.states, old.success, dict(old.turns[0].rewards)) == ((), None, {})


def test_an_environment_is_closed_however_its_rollout_ends():
    for replies, stop in ((["right"] * 3, "done"), (["burn"], "error"), (["x" * 80], "max_tokens")):
        environment = Corridor(TASK)
        assert played(*replies, environment=environment).stop == stop
        assert environment.closed == 1


def test_a_failing_close_changes_nothing():
    class Sticky(Corridor):
        async def close(self) -> None:
            raise OSError("stuck")

    assert played("right", "right", "right", environment=Sticky(TASK)).stop == "done"


def test_an_environment_may_start_asynchronously():
    class Slow(Corridor):
        async def start(self):  # pyright: ignore[reportIncompatibleMethodOverride]
            await asyncio.sleep(0)
            return (Message(role="user", content="field 0"),)

    assert played("right", "right", "right", environment=Slow(TASK)).success


def test_an_environment_may_answer_without_a_coroutine():
    class Plain(Corridor):
        def step(self, text: str) -> Step:  # pyright: ignore[reportIncompatibleMethodOverride]
            return Step(action=Action(), stop="done", success=text == "right")

    assert played("right", environment=TurnLimit(Plain(TASK), 3)).success


def test_what_an_environment_must_not_say_or_do_is_its_failure_alone():
    class Wrong(Corridor):
        def start(self):
            return "field 0" if self.place else super().start()

        async def step(self, text: str):  # pyright: ignore[reportIncompatibleMethodOverride]
            if text == "quit":
                raise SystemExit(3)
            return "field 1", 0.5, False

    faults = {
        "quit": "RuntimeError: it called exit(3)",
        "right": "TypeError: step() must return a Step; got tuple \"('field 1', 0.5, False)\"",
    }
    for said, fault in faults.items():
        assert (played(said, environment=Wrong(TASK)).stop, played(said, environment=Wrong(TASK)).error) == (
            "error",
            fault,
        )
    begun = Task(id="t", question="", metadata={"start": 1})
    error = played("right", environment=Wrong(begun)).error
    assert error == "TypeError: start() must return a tuple of Message records; got str 'field 0'"


def test_a_reward_that_is_no_finite_number_is_the_environments_failure():
    rollout = played("nan")
    assert rollout.stop == "error"
    assert "must be finite" in str(rollout.error)
    assert dict(rollout.turns[0].rewards) == {}


def test_a_turn_limit_leaves_an_environment_that_would_go_on():
    limited = TurnLimit(Corridor(TASK), 2)
    rollout = played("right", "left", "right", environment=limited)
    assert (rollout.stop, rollout.success, len(rollout.turns)) == ("max_turns", None, 2)
    assert played(*["right"] * 3, environment=TurnLimit(Corridor(TASK), 3)).stop == "done"


# ------------------------------------------------------------------------------------ rewards


def test_the_last_steps_reward_is_the_outcome_and_absent_is_absent():
    scored = score(TASK, played("right", "wait", "right", "right"), protocol=None)
    assert scored.turn_rewards == ({"environment": 0.5}, {}, {"environment": 0.5}, {})
    assert scored.outcome_rewards == {"environment": 0.5}


def test_weights_scale_the_environments_rewards_and_pay_its_flag():
    rollout = played("right", "right", "right")
    scored = score(TASK, rollout, {"environment": 2.0, "success": 3.0}, protocol=None)
    assert scored.turn_rewards == ({"environment": 1.0}, {"environment": 1.0}, {})
    assert scored.outcome_rewards == {"environment": 1.0, "success": 3.0}
    unpaid = score(TASK, rollout, {"environment": 0}, protocol=None)
    assert (unpaid.turn_rewards, unpaid.outcome_rewards) == (({}, {}, {}), {})


def test_a_token_budget_leaves_what_was_earned_with_the_turns():
    # the reply of "field 1" does not fit, so the rollout is cut off after a step that was paid
    prompt = len(CHAT.prompt_ids(Corridor(TASK).start()))
    tight = Limits(max_turn_tokens=6, context=prompt + 13, max_turns=1)
    scored = score(TASK, played("right", limits=tight), protocol=None)
    assert scored.stop == "max_tokens"
    assert (scored.turn_rewards, scored.outcome_rewards) == (({"environment": 0.5},), {})


def test_a_failed_rollout_earns_nothing():
    scored = score(TASK, played("right", "burn"), protocol=None)
    assert (scored.stop, scored.turn_rewards, scored.outcome_rewards) == ("error", (), {})


def test_what_compares_with_answers_is_absent_without_them():
    rollout = Rollout(
        task_id="t",
        group=0,
        prompt_ids=(1,),
        turns=(Turn(action_ids=(1,), sampling_logprobs=(0.0,), text="x", action=Action(answer="x")),),
        stop="answer",
    )
    open_task, answered = Task(id="t", question="?"), Task(id="t", question="?", answers=("x",))
    assert "exact_match" not in score(open_task, rollout).outcome_rewards
    assert score(answered, rollout).outcome_rewards["exact_match"] == 1.0
    assert "exact_match" not in rollout_metrics(open_task, rollout)
    assert rollout_metrics(answered, rollout)["exact_match"] == 1.0


def test_metrics_of_an_environment_are_its_return_and_its_flag():
    good, poor = played("right", "right", "right"), played("left", "right", environment=TurnLimit(Corridor(TASK), 2))
    found = rollout_metrics(TASK, good, None)
    assert (found["environment_return"], found["success"]) == (1.5, 1.0)
    assert not {"tool_execution", "exact_match", "xml_format"} & found.keys()
    means = mean_metrics([(TASK, good), (TASK, poor)], None)
    assert means["environment_return"] == (1.5 + 0.25) / 2
    assert means["success"] == 0.5  # the poor one was cut off before its environment said anything
    assert "success" not in mean_metrics([(TASK, poor)], None)


def test_a_rollout_that_is_cut_off_has_the_flag_of_its_last_step():
    class Telling(Corridor):
        async def step(self, text: str) -> Step:
            return dataclasses.replace(await super().step(text), success=self.place == 3)

    assert played("right", "right", environment=TurnLimit(Telling(TASK), 2)).success is False
    assert played("right", "x" * 80, environment=Telling(TASK)).success is False  # the budget of tokens


def test_a_success_is_a_better_validation_than_any_return():
    ratings = [rating({}), rating({"environment_return": 9.0}), rating({"success": 0.1}), rating({"exact_match": 0.0})]
    assert ratings == sorted(ratings)
    assert rating({"success": 0.2}) > rating({"success": 0.1, "environment_return": 9.0})


def test_the_reports_tables_have_return_and_success_instead_of_what_compares_with_answers():
    def row(**numbers: float) -> Row:
        cells = {name: Cell(mean=value, low=value, high=value, num_runs=1) for name, value in numbers.items()}
        return Row(population="validation", estimator="gigpo", seeds=(1,), cells={**dict.fromkeys(COLUMNS), **cells})

    elsewhere, answering = row(success=0.25, environment_return=-0.5), row(exact_match=0.5)
    assert columns_of([elsewhere]) == ["success", "environment_return"]
    assert columns_of([answering]) == [name for name in COLUMNS if name not in ELSEWHERE]
    table = markdown_table([elsewhere])
    assert "| Method | Seeds | Success, end | Return |" in table
    assert "| gigpo | 1 | 25.0 | -0.50 |" in table


# ------------------------------------------------------------------------------------- credit


def test_every_method_without_a_critic_credits_the_same_rollouts():
    ways = (["right"] * 3, ["left", "right", "right", "right"], ["wait", "right", "left", "right"])
    weights = {"environment": 1.0, "success": 1.0}
    rollouts = [played(*way, environment=TurnLimit(Corridor(TASK), 4)) for way in ways]
    group = [score(TASK, rollout, weights, protocol=None) for rollout in rollouts]
    for estimator in ("grpo-or", "grpo-mr", "mt-grpo", "turn-rloo", "gigpo", "hgpo"):
        found = credit_rollouts(group, TrainConfig(estimator=estimator, environment="gym:X"))
        assert len(found.credit.advantages) == sum(len(r.turns) for r in group)
        assert any(abs(a) > 1e-6 for a in found.credit.advantages), estimator


def test_turns_in_one_state_are_compared_however_they_came_there():
    # states before the turns: a = 0 1 2, b = 0 0 1 2: state 1 is reached by turn 2 of a and turn 3 of b
    group = [score(TASK, played(*way), protocol=None) for way in (["right"] * 3, ["wait", "right", "right", "right"])]
    keys = credit.anchor_keys(rollout_table(group))
    assert keys.tolist()[1] == keys.tolist()[5]
    assert keys.tolist()[0] == keys.tolist()[3] == keys.tolist()[4]
    unnamed = [dataclasses.replace(r, states=()) for r in group]
    assert len(set(credit.anchor_keys(rollout_table(unnamed)).tolist())) > len(set(keys.tolist()))


def test_leaves_of_a_tree_have_their_own_copies_of_the_environment():
    class Chooses(ScriptedEngine):
        """Goes right, except that a second child goes left: its conversation has a seed of its own."""

        async def generate(self, prompt_ids, sampling, *, session):
            self._calls[session] = 0
            word = "right" if sampling.seed % 2 else "left"
            self._scripts[session] = [word]
            return await super().generate(prompt_ids, sampling, session=session)

    tree = run_tree(TASK, TurnLimit(Corridor(TASK), 3), Chooses(["x"], CHAT), CHAT, branches=(3, 2), limits=LIMITS)
    leaves = [score(TASK, leaf, protocol=None) for leaf in asyncio.run(tree)]
    assert len(leaves) == 6
    for leaf in leaves:
        place, states = 0, []
        for turn in leaf.turns:  # what each leaf did by itself, walked through again
            states.append(str(place))
            place = max(0, place + (1 if turn.text == "right" else -1))
            assert turn.rewards["environment"] == (0.5 if turn.text == "right" else -0.25)
        assert leaf.states == tuple(states)
    assert len({tuple(turn.text for turn in leaf.turns) for leaf in leaves}) > 1
    for estimator in ("mt-grpo-tree", "treerl"):
        config = TrainConfig(estimator=estimator, branches=(3, 2), max_turns=3, environment="gym:X")
        assert any(abs(a) > 1e-6 for a in credit_rollouts(leaves, config).credit.advantages), estimator


# ------------------------------------------------------------------------- where they come from

MODULE = '''
from turnwise import Task, ToolEnvironment, search_tool, open_index
from turnwise.env import Step
from turnwise.metrics import answer_presence, exact_match
import dataclasses

TOOLS = {"search": search_tool(open_index("atlas"))}

class Paying:
    """The world of facts, as somebody else would serve it: it pays finds and right answers itself."""

    def __init__(self, task):
        self.task, self.inner = task, ToolEnvironment(task, TOOLS, max_turns=9)

    def start(self):
        return self.inner.start()

    async def step(self, text):
        step = await self.inner.step(text)
        golds = list(self.task.metadata["golds"])
        if step.result:
            paid = {"environment": answer_presence(step.result.text, golds)}
            return dataclasses.replace(step, rewards=paid)
        right = exact_match(step.action.answer or "", golds)
        return dataclasses.replace(step, rewards={"environment": 2 * right}, success=right == 1)

def make(task):
    return Paying(task)

def tasks(split):
    from turnwise import atlas
    return [
        Task(id=t.id, question=t.question, kind=t.kind, metadata={"golds": t.answers})
        for t in atlas.tasks(split)[:4]
    ]
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("elsewhere") / "facts.py"
    path.write_text(MODULE)
    return str(path)


@pytest.fixture(scope="module")
def run(module: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of the embedded agent in the module's environment."""
    out = tmp_path_factory.mktemp("runs") / "elsewhere"
    options = {"steps": 1, "tasks_per_step": 2, "group_size": 4, "minibatches": 1, "validation_size": 3, "threads": 1}
    train(environment=module, estimator="mt-grpo", log_groups=4, out=out, **options)
    return out


def test_training_in_an_environment_from_elsewhere_records_its_rewards(run: Path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record["metrics"] for record in records if record["split"] == "train"][-1]
    assert {"environment_return", "success", "reward/environment"} <= last.keys()
    assert last["reward/environment"] == pytest.approx(last["environment_return"])  # weight 1
    assert "exact_match" not in last
    assert "success" in records[0]["metrics"]
    assert (run / "best").is_dir()
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert any(turn["rewards"] for line in lines for turn in line["rollout"]["turns"])
    assert json.loads((run / "config.json").read_text())["config"]["reward_weights"] == {"environment": 1.0}


def test_a_run_is_evaluated_asked_and_reported_where_it_was_trained(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(run), "--limit", "2"]) == 0
    assert "success" in capsys.readouterr().out
    assert main(["ask", str(run), "What is the capital of Kenya?"]) == 2  # the module's tasks need golds
    assert "environment must not fail" in capsys.readouterr().err
    assert main(["ask", str(run), atlas.tasks("test")[0].id]) == 0  # as this one has them
    assert atlas.tasks("test")[0].answers[0] in capsys.readouterr().out
    assert main(["serve", str(run), "--port", "0"]) == 2
    assert "a served agent must have tools that answer it" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert {outcome_of(line) for line in load_run(run).rollouts} <= {"right", "wrong"}
    assert "Success, end" in page
    assert "Exact match, end" not in page
    assert main(["credit", str(run / "rollouts.jsonl"), "--methods", "mt-grpo", "gigpo"]) == 0


def test_another_environment_can_be_evaluated_in(module: str):
    found = evaluate("embedded", environment=module, max_turns=3, limit=2)
    assert found.name == "test"
    assert {"success", "environment_return"} <= found.metrics.keys()
    [[rollout]] = rollouts("embedded", environment=module, tasks=None, group_size=1, max_turns=3)[:1]
    assert rollout.outcome_rewards.keys() <= {"environment"}


def test_tasks_of_an_environment_need_neither_question_nor_answers(tmp_path: Path, module: str):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": 1, "seed": 4}\n{"id": 2, "question": "Why?", "golds": ["x"]}\n')
    first, second = load_tasks(file, answered=False)
    assert (first.question, first.answers, first.metadata) == ("", (), {"seed": 4})
    assert second.question == "Why?"
    with pytest.raises(InputError, match="field 'question'"):
        load_tasks(file)
    setting = make_setting(TrainConfig(environment=module, tasks=str(file), validation_tasks=str(file)))
    assert [task.id for task in setting.train] == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "x.py"}, "tools must go with the environment of tools"),
        ({"protocol": "search"}, "protocol must go with the environment of tools"),
        ({"corpus": "x.jsonl"}, "corpus must go with"),
        ({"reward_weights": {"xml_format": 1.0}}, "xml_format, which looks for tags"),
        ({"reward_weights": {"retrieval": 1.0}}, "looks for tags"),
    ],
)
def test_options_of_tools_and_tags_are_refused_elsewhere(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(environment="gym:X", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"must define make\(task\)"),
        ("def make(): ...", r"make in .* must take \(task\)"),
        ("def make(task): ...\ntasks = 3", "tasks in .* must be a function"),
        ("def make(task): ...\nREWARDS = 'a'", "REWARDS in .* must be a list of names"),
        ("def make(task): return 3\ndef tasks(split): return []", "there must be questions"),
        ("def make(task): return 3", "has none of its own; give --tasks"),
        ("def make(task): return 3\ndef tasks(split): return [1]", "must be turnwise.Task records"),
        ("def make(task): return 3\ndef tasks(split): raise OSError('gone')", "must not fail; got OSError: gone"),
    ],
)
def test_a_module_that_is_no_source_of_environments_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        make_setting(TrainConfig(environment=str(path)))


def test_an_unknown_source_and_an_unknown_reward_are_refused(module: str):
    with pytest.raises(ConfigError, match="must be a Python file, or begin with gym:, openenv:, textworld:"):
        load_source("atari:pong")
    with pytest.raises(ConfigError, match="reward component must be a known name; got 'enviroment'"):
        make_setting(TrainConfig(environment=module, reward_weights={"enviroment": 1.0}))


def test_an_environment_that_cannot_be_made_or_started_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "broken.py"
    tasks = "from turnwise import Task\ndef tasks(split): return [Task(id=split + i, question='') for i in 'abc']\n"
    path.write_text(tasks + "def make(task): raise KeyError('board')")
    options = ["--environment", str(path), "--out", str(tmp_path / "run")]
    assert main(["train", *options]) == 2
    assert "must start; got KeyError: 'board'" in capsys.readouterr().err
    path.write_text(
        tasks
        + "class E:\n def start(self): raise OSError('no board')\n def step(self): ...\ndef make(task): return E()"
    )
    assert main(["train", *options]) == 2
    assert "must start; got OSError: no board" in capsys.readouterr().err
    path.write_text(tasks + "def make(task): return 3")
    assert main(["train", *options]) == 2
    assert "must return an environment with start() and step(text); got 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rollouts_that_all_fail_are_an_error_of_the_environment(tmp_path: Path):
    path = tmp_path / "failing.py"
    path.write_text(
        "from turnwise import Task\nfrom turnwise.types import Message\n"
        "def tasks(split): return [Task(id=split + str(i), question='') for i in range(3)]\n"
        "class E:\n"
        " def start(self): return (Message(role='user', content='What is the capital of Kenya?'),)\n"
        " async def step(self, text): raise OSError('gone')\n"
        "def make(task): return E()\n"
    )
    with pytest.raises(RunError, match="OSError: gone; mend the environment"):
        evaluate("embedded", environment=str(path), limit=2)


def test_an_environment_that_cannot_be_copied_does_not_branch(monkeypatch: pytest.MonkeyPatch):
    source = Source(name="far", make=Corridor, task_of=lambda text: TASK, tasks=lambda s: seed_tasks(s, 2), forks=False)
    monkeypatch.setattr("turnwise.setting.load_source", lambda spec: source)
    with pytest.raises(ConfigError, match="must go with an environment that can be copied; far cannot"):
        make_setting(TrainConfig(environment="far", estimator="treerl", branches=(2,), max_turns=3))


def test_seeds_of_splits_do_not_meet():
    seeds = [{task.metadata["seed"] for task in seed_tasks(split, 1000)} for split in ("train", "validation", "test")]
    assert len(set.union(*seeds)) == 3000


def test_an_action_is_the_last_block_or_the_whole_message():
    assert read_action(" go east \n")[0] == "go east"
    text = "I think <action>no</action> then <action> open\nbox </action> done"
    written, action = read_action(text)
    assert written == "open\nbox"
    assert action.reasoning == "I think <action>no</action> then"
    assert action.tool_calls[0].arguments == {"action": "open\nbox"}
