"""Gymnasium-style environments: anything with reset and step, and gymnasium's own by their ids."""

import asyncio
import subprocess
import sys

import pytest

from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.env import forked
from turnwise.envs import load_source
from turnwise.envs.gym import GymEnvironment
from turnwise.errors import ConfigError, InputError
from turnwise.rollout import Limits, run_rollout
from turnwise.types import Rollout, Task

CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=60, context=4000, max_turns=9)
LAKE = "gym:FrozenLake-v1?is_slippery=false&actions=left,down,right,up&seeds=5"
WAY = ("down", "down", "right", "right", "down", "right")
"""The way over the 4 x 4 lake: S at the top left, G at the bottom right, around the holes."""


class Echo:
    """A text environment without any package: it repeats, and pays a word's length; `end` and `late` end it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.began: dict = {}

    def reset(self, **began):
        self.began = began
        return "say something", {}

    def step(self, action: str):
        self.said.append(action)
        return f"you said {action}", len(action), action == "end", action == "late", {"success": action == "end"}


def played(environment, *replies: str) -> Rollout:
    engine = ScriptedEngine(list(replies), CHAT)
    return asyncio.run(run_rollout(Task(id="t", question=""), environment, engine, CHAT, limits=LIMITS))


def lake(seed: int = 0):
    source = load_source(LAKE)
    assert source.tasks is not None
    return source.environment(source.tasks("train")[seed], 9)


def test_a_text_environment_is_played_as_it_is():
    inner = Echo()
    rollout = played(GymEnvironment(inner, Task(id="t", question="")), "abc", "<action>de</action>", "end")
    assert inner.said == ["abc", "de", "end"]
    assert [dict(turn.rewards) for turn in rollout.turns] == [{"environment": n} for n in (3.0, 2.0, 3.0)]
    assert (rollout.stop, rollout.success) == ("done", True)
    assert [turn.results[0].text for turn in rollout.turns][:2] == ["you said abc", "you said de"]


def test_truncated_is_a_limit_and_terminated_the_end():
    late = played(GymEnvironment(Echo(), Task(id="t", question="")), "late")
    assert (late.stop, late.terminated, late.success) == ("max_turns", False, False)


def test_seed_options_and_question_come_from_the_task():
    inner = Echo()
    task = Task(id="t", question="Be brief.", metadata={"seed": 7, "options": {"hard": True}})
    system, user = GymEnvironment(inner, task, instructions="You echo.").start()
    assert inner.began == {"seed": 7, "options": {"hard": True}}
    assert system.content.startswith("You echo.\n")
    assert user.content == "Be brief.\n\nsay something"
    with pytest.raises(InputError, match="seed of task 't' must be a whole number"):
        GymEnvironment(inner, Task(id="t", question="", metadata={"seed": "x"})).start()


def test_words_stand_for_the_numbers_of_a_duck_typed_environment():
    inner = Echo()
    environment = GymEnvironment(inner, Task(id="t", question=""), actions=["Go", "end"])
    assert "Actions: go, end." in environment.start()[0].content
    step = asyncio.run(environment.step("fly"))
    assert (inner.said, step.results[0].error, dict(step.rewards), step.stop) == ([], "bad_arguments", {}, None)
    assert step.reply[0].content == "Error: the action must be one of go, end"


def test_duck_typed_environments_need_no_gymnasium():
    code = "import sys, turnwise.envs.gym, turnwise.envs; print('gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


gymnasium = pytest.importorskip("gymnasium", reason='needs gymnasium: pip install "turnwise[gymnasium]"')


def test_a_lake_is_crossed_in_words():
    rollout = played(lake(), *WAY)
    assert [turn.rewards["environment"] for turn in rollout.turns] == [0, 0, 0, 0, 0, 1]
    assert (rollout.stop, rollout.success) == ("done", None)  # the lake itself says nothing of success
    assert rollout.turns[0].results[0].text == "(Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"  # the coloured field in brackets


def test_an_equal_place_is_an_equal_state_though_the_picture_differs():
    rollout = played(lake(), "right", "left", "down", "up", *WAY)
    assert rollout.states[0] == rollout.states[2] == rollout.states[4]
    pictures = [turn.results[0].text for turn in rollout.turns]
    assert pictures[1] != pictures[3]  # (Left) and (Up)
    assert (rollout.stop, len(rollout.turns)) == ("max_turns", 9)


def test_a_copy_of_a_lake_goes_on_by_itself():
    environment = lake()
    environment.start()
    asyncio.run(environment.step("right"))
    twin = forked(environment)
    asyncio.run(twin.step("right"))
    assert asyncio.run(environment.step("left")).results[0].text.startswith("(Left)\n[S]FFF")
    assert asyncio.run(twin.step("left")).results[0].text.startswith("(Left)\nS[F]FF")


def test_seeds_decide_what_happens_on_slippery_ice():
    source = load_source("gym:FrozenLake-v1?actions=left,down,right,up")

    def places(seed: int) -> list[str]:
        assert source.tasks is not None
        return list(played(source.environment(source.tasks("train")[seed], 9), *["down"] * 9).states)

    assert places(3) == places(3)
    assert len({tuple(places(seed)) for seed in range(6)}) > 1


def test_actions_without_words_are_numbers():
    source = load_source("gym:CliffWalking-v1?seeds=2")
    step = asyncio.run(started_step(source, "0"))
    assert step.rewards == {"environment": -1.0}
    assert source.tasks is not None
    assert len(source.tasks("validation")) == 2


async def started_step(source, text: str):
    environment = source.environment(source.tasks("test")[0], 3)
    environment.start()
    return await environment.step(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gym:NoSuch-v0", "must name an environment"),
        ("gym:FrozenLake-v1?slippy=1", "must name an environment; got TypeError"),
        ("gym:CartPole-v1", "must have observations of text, or a rendering as text"),
        ("gym:FrozenLake-v1?seeds=0", "seeds of gym: must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_played_in_text_is_refused(spec: str, message: str):
    with pytest.raises(InputError, match=message):
        load_source(spec)


def test_too_few_words_are_refused_for_the_first_task():
    source = load_source("gym:FrozenLake-v1?actions=left,right")
    assert source.tasks is not None
    with pytest.raises(ConfigError, match="must be a word for each of 4 actions; got 2"):
        source.environment(source.tasks("train")[0], 3)


def test_a_seed_is_asked_for_by_number():
    source = load_source(LAKE)
    assert source.task_of(" 12 ").metadata == {"seed": 12}
    with pytest.raises(InputError, match="must be a seed; got 'kenya'"):
        source.task_of("kenya")
