"""OpenEnv: a real server on loopback; its rewards become turn rewards, its failures a rollout's."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("openenv", reason='needs openenv: pip install "turnwise[openenv]"')

from turnwise.chat import byte_chat
from turnwise.config import TrainConfig
from turnwise.engine import ScriptedEngine
from turnwise.envs import load_source
from turnwise.envs.openenv import observation_text
from turnwise.errors import ConfigError, InputError
from turnwise.rewards import score
from turnwise.rollout import Limits, run_groups
from turnwise.setting import make_setting
from turnwise.types import Rollout, Task

CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=60, context=4000, max_turns=6)


@contextlib.contextmanager
def serving(*, fields: int = 1) -> Iterator[str]:
    """A guessing game's server: the seed's last digit is looked for, a wrong guess costs .1, the right one pays 1."""
    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State
    from pydantic import create_model

    guess = create_model(
        "Guess", __base__=Action, message=(str, ...), **{f"x{i}": (int, ...) for i in range(1, fields)}
    )

    class Heard(Observation):
        text: str

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        number = 0

        def reset(self, seed=None, episode_id=None, **_):
            self.number = (seed or 0) % 10
            return Heard(text="guess 0 to 9")

        def step(self, action, timeout_s=None, **_):
            if action.message == "boom":
                raise ValueError("boom")
            if action.message == "sleep":
                time.sleep(1.0)
            if action.message == "hm":
                return Heard(text="well?")
            right = action.message == str(self.number)
            told = {"metadata": {"success": True}} if right else {}
            return Heard(text="right" if right else "wrong", reward=1.0 if right else -0.1, done=right, **told)

        @property
        def state(self):
            return State()

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_fastapi_app(Game, guess, Heard, max_concurrent_envs=64)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as address:
        yield address


def played(spec: str, *replies: str, seeds: tuple[int, ...] = (7,), group_size: int = 1) -> list[list[Rollout]]:
    source = load_source(spec)
    tasks = [source.task_of(str(seed)) for seed in seeds]
    engine = ScriptedEngine(list(replies), CHAT)
    make = lambda task: source.environment(task, 6)  # noqa: E731
    return asyncio.run(run_groups(tasks, make, engine, CHAT, group_size=group_size, limits=LIMITS))


def test_per_step_rewards_become_turn_rewards(url: str):
    [[rollout]] = played(f"openenv:{url}", "3", "hm", "7")
    assert [dict(turn.rewards) for turn in rollout.turns] == [{"environment": -0.1}, {}, {"environment": 1.0}]
    assert (rollout.stop, rollout.success) == ("done", True)
    assert [turn.results[0].text for turn in rollout.turns] == ["wrong", "well?", "right"]
    scored = score(Task(id="seed-7", question="seed 7"), rollout, protocol=None)
    assert scored.turn_rewards == ({"environment": -0.1}, {}, {})
    assert scored.outcome_rewards == {"environment": 1.0}


def test_each_rollout_has_a_session_of_its_own(url: str):
    groups = played(f"openenv:{url}", "1", "2", "3", "4", seeds=(2, 4), group_size=8)
    assert {len(r.turns) for r in groups[0]} == {2}
    assert {len(r.turns) for r in groups[1]} == {4}
    assert all(r.success for group in groups for r in group)


def test_an_action_that_the_server_does_not_take_costs_its_turn(url: str):
    [[rollout]] = played(f"openenv:{url}", '{"x": 1}', '{"message": "7"}')
    assert (rollout.turns[0].results[0].error, dict(rollout.turns[0].rewards)) == ("bad_arguments", {})
    assert rollout.success


def test_an_environments_own_failure_ends_the_rollout_with_error(url: str):
    [[rollout]] = played(f"openenv:{url}", "3", "boom")
    assert (rollout.stop, len(rollout.turns)) == ("error", 2)
    assert "boom" in str(rollout.error)


def test_a_reply_that_does_not_come_in_time_is_a_failure(url: str):
    [[rollout]] = played(f"openenv:{url}?timeout=0.3", "sleep")
    assert (rollout.stop, str(rollout.error).split(":")[0]) == ("error", "TimeoutError")


def test_a_lost_connection_is_a_failure_and_not_a_new_session():
    with serving() as address:
        source = load_source(f"openenv:{address}?timeout=3")
        environment = source.environment(source.task_of("7"), 6)

        async def lose() -> str:
            await environment.start()  # pyright: ignore[reportGeneralTypeIssues]
            await environment.step("3")
            client = environment._environment._client  # pyright: ignore[reportAttributeAccessIssue]
            await client._ws.close()  # as a proxy or a restart would; the server goes on
            try:
                await environment.step("7")
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "went on"

        assert asyncio.run(lose()) == "ConnectionError: the connection was lost, and with it the session"
    with pytest.raises(InputError, match="must be an OpenEnv server that tells its schema"):
        load_source(f"openenv:{address}")


def test_a_server_that_is_gone_fails_every_rollout():
    with serving() as address:
        source = load_source(f"openenv:{address}?timeout=2")
    engine = ScriptedEngine(["7"], CHAT)
    make = lambda task: source.environment(task, 6)  # noqa: E731
    [[rollout]] = asyncio.run(run_groups([source.task_of("7")], make, engine, CHAT, group_size=1, limits=LIMITS))
    assert (rollout.stop, rollout.turns) == ("error", ())
    assert "ConnectionError" in str(rollout.error)


def test_an_action_of_several_fields_is_written_in_json():
    with serving(fields=2) as address:
        source = load_source(f"openenv:{address}")
        environment = source.environment(source.task_of("7"), 6)

        async def play():
            system, _ = await environment.start()  # pyright: ignore[reportGeneralTypeIssues]
            bad, good = await environment.step("7"), await environment.step('{"message": "7", "x1": 2}')
            await environment.close()  # pyright: ignore[reportAttributeAccessIssue]
            return system.content, bad.results[0].text, good.stop

        rules, bad, stop = asyncio.run(play())
        assert '{"message": "string", "x1": "integer"}' in rules
        assert bad == "Error: the action must be one JSON object"
        assert stop == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?field=text", "must be one of the action's, message; got 'text'"),
        ("?timeout=0", "timeout of openenv: must be seconds"),
        ("?seed=3", "an option of openenv: must be a known name; got 'seed'; did you mean seeds?"),
    ],
)
def test_wrong_options_are_refused(url: str, options: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_source(f"openenv:{url}{options}")


def test_an_address_without_http_is_refused():
    with pytest.raises(ConfigError, match="must be followed by a server's URL; got '127"):
        load_source("openenv:127.0.0.1:9")


def test_sessions_cannot_branch(url: str):
    options = {"estimator": "treerl", "branches": (2,), "max_turns": 3}
    with pytest.raises(ConfigError, match="must go with an environment that can be copied"):
        make_setting(TrainConfig(environment=f"openenv:{url}", **options))


def test_an_observation_is_its_one_text_or_json():
    assert observation_text({"text": "hi", "metadata": {}, "done": False}) == "hi"
    assert observation_text({"board": [1, 2], "text": "é"}) == '{"board": [1, 2], "text": "é"}'
