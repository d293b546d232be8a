"""TextWorld's games: made from a seed, played through, and worth points and progress."""

import asyncio
import runpy
from pathlib import Path

import pytest

pytest.importorskip("textworld", reason='needs textworld: pip install "turnwise[textworld]"')

from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.env import forked
from turnwise.envs import load_source
from turnwise.envs.source import Source
from turnwise.envs.textworld import TextWorldEnvironment, make_game
from turnwise.errors import InputError
from turnwise.rewards import score
from turnwise.rollout import Limits, run_rollout
from turnwise.types import Rollout, Task

pytestmark = pytest.mark.slow  # a game takes seconds to compile
CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=80, context=40_000, max_turns=12)
SIZE = "rooms=2&objects=2&quest=2&quests=2&games=2"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Games of two quests, in a cache of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = load_source(f"textworld:?{SIZE}")
        make_game(0, rooms=2, objects=2, quest=2, quests=2)
        yield made


@pytest.fixture
def task(source: Source) -> Task:
    assert source.tasks is not None
    return source.tasks("train")[0]


def game_file(source: Source) -> Path:
    return make_game(0, rooms=2, objects=2, quest=2, quests=2)


def solution(source: Source) -> list[str]:
    import textworld

    game = textworld.Game.load(str(game_file(source).with_suffix(".json")))
    return list(game.metadata["walkthrough"])


def played(source: Source, task: Task, *commands: str) -> Rollout:
    engine = ScriptedEngine(list(commands), CHAT)
    return asyncio.run(run_rollout(task, source.environment(task, 12), engine, CHAT, limits=LIMITS))


def test_the_solution_wins_and_every_quest_pays_a_point(source: Source, task: Task):
    rollout = played(source, task, *solution(source))
    assert (rollout.stop, rollout.success) == ("done", True)
    points = [turn.rewards["environment"] for turn in rollout.turns]
    assert sum(points) == 2
    assert all(turn.rewards["progress"] == 1 for turn in rollout.turns)
    scored = score(task, rollout, {"environment": 1.0, "progress": 0.0, "success": 1.0}, protocol=None)
    assert sum(r["environment"] for r in scored.turn_rewards if r) + scored.outcome_rewards["environment"] == 2
    assert scored.outcome_rewards["success"] == 1


def test_detours_lead_back_to_equal_states_and_are_charged_in_progress(source: Source, task: Task):
    way = solution(source)
    rollout = played(source, task, "look", "inventory", "dance", *way)
    assert len(set(rollout.states[:4])) == 1
    assert [turn.rewards["progress"] for turn in rollout.turns[:3]] == [0, 0, 0]
    assert rollout.states[3:] == played(source, task, *way).states
    assert "Commands: " in rollout.turns[0].results[0].text


def test_a_copy_of_a_game_goes_on_by_itself(source: Source, task: Task):
    way = solution(source)

    async def both() -> tuple[bool, list[bool]]:
        environment = source.environment(task, 12)
        environment.start()
        await environment.step(way[0])
        twin = forked(environment)
        before = environment.state_key()  # pyright: ignore[reportAttributeAccessIssue]
        won = [(await twin.step(command)).success for command in way[1:]][-1]
        unmoved = environment.state_key() == before  # pyright: ignore[reportAttributeAccessIssue]
        again = [(await environment.step(command)).success for command in way[1:]][-1]
        return bool(won), [unmoved, bool(again)]

    assert asyncio.run(both()) == (True, [True, True])


def test_games_of_a_folder_are_tasks_by_name(source: Source):
    folder = game_file(source).parent
    named = load_source(f"textworld:{folder}?commands=false")
    assert named.tasks is not None
    [task] = named.tasks("train")
    rollout = played(named, task, *solution(source))
    assert rollout.success
    assert "Commands: " not in rollout.turns[0].results[0].text
    with pytest.raises(InputError, match=r"a task must be a game of .*; got 'other'"):
        named.make(named.task_of("other"))


def test_a_game_is_made_once(source: Source):
    before = game_file(source).stat().st_mtime_ns
    assert game_file(source).stat().st_mtime_ns == before
    assert not [path for path in game_file(source).parent.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("textworld:?room=3", "an option of textworld: must be a known name; got 'room'"),
        ("textworld:?rooms=x", "rooms of textworld: must be a whole number >= 1; got 'x'"),
        ("textworld:?commands=1", "commands of textworld: must be true or false"),
        ("textworld:nowhere", "nowhere must hold TextWorld games"),
        ("textworld:nowhere?rooms=3", "rooms of textworld: must go without a folder"),
    ],
)
def test_wrong_options_are_refused(spec: str, message: str):
    with pytest.raises(InputError, match=message):
        load_source(spec)


def test_a_task_without_a_seed_has_no_game(source: Source):
    with pytest.raises(InputError, match="must have a seed"):
        source.make(Task(id="x", question=""))


def test_prompt_and_state_are_the_games_own(source: Source):
    environment = TextWorldEnvironment(game_file(source), Task(id="x", question="Hurry."))
    system, user = environment.start()
    assert "text adventure" in system.content
    assert user.content.startswith("Hurry.\n\n")
    assert "$$" not in user.content  # the banner is left out
    environment.close()


def test_the_example_plays_and_learns(source: Source):
    path = Path(__file__).parent.parent / "examples" / "textworld_player.py"
    namespace = runpy.run_path(str(path))
    won = namespace["play"](f"textworld:?{SIZE}", "gigpo", steps=4, max_turns=8)
    assert len(won) == 4
    assert won[-1] >= won[0]
    assert len(path.read_text().splitlines()) < 100
