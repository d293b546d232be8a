"""Environments on an OpenEnv server: a session of its own for each rollout, per-step rewards as turn rewards."""

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from turnwise.env import Step
from turnwise.envs.source import (
    SEEDS,
    Source,
    asked_seed,
    first_messages,
    missing_package,
    read_action,
    seed_of,
    seed_tasks,
    split_spec,
    step_of,
    whole_option,
)
from turnwise.errors import ConfigError, InputError, described
from turnwise.records import parsed
from turnwise.types import Message, Task
from turnwise.web import whole_body

TIMEOUT_S = 60.0
"""Seconds that connecting and every message may take."""
MOST_BYTES = 16 << 20
"""Most bytes of a message."""
_OWN_FIELDS = ("metadata", "done", "reward")


class OpenEnvEnvironment:
    """One session of an OpenEnv server, with its step rewards as the component `environment`.

    The policy's action is the text field `field` of the server's action, or, where that is None or the message is a
    JSON object, the object itself. An observation with one text field is that text, any other is shown as JSON. An
    action that the server finds invalid is an error that costs its turn. What goes wrong with the connection, a reply
    that does not come in `timeout_s` included, is a failure of the environment. `success` in an observation's metadata
    says whether the task is solved.
    """

    def __init__(
        self, url: str, task: Task, *, field: str | None, instructions: str = "", timeout_s: float = TIMEOUT_S
    ) -> None:
        self._task = task
        self._field = field
        self._instructions = instructions
        self._client = _session(url, timeout_s)

    async def start(self) -> tuple[Message, ...]:
        """Connects and resets; the rules as system message, the first observation as user message."""
        await self._client.connect()
        given = dict(self._task.metadata.get("reset") or {})
        seed = seed_of(self._task)
        result = await self._client.reset(**given, **({} if seed is None else {"seed": seed}))
        return first_messages(self._instructions, self._task, observation_text(result.observation))

    async def step(self, text: str) -> Step:
        """One step on the server with the action that the message writes."""
        written, action = read_action(text)
        payload = _payload(written, self._field)
        if payload is None:
            return step_of(action, "Error: the action must be one JSON object", error="bad_arguments")
        try:
            result = await self._client.step(payload)
        except RuntimeError as error:
            if "VALIDATION_ERROR" not in str(error):
                raise
            return step_of(action, "Error: the action is none that the environment takes", error="bad_arguments")
        told = result.metadata or result.observation.get("metadata") or {}
        success = told.get("success")
        return step_of(
            action,
            observation_text(result.observation),
            stop="done" if result.done else None,
            reward=result.reward,
            success=None if success is None else bool(success),
        )

    def fork(self) -> "OpenEnvEnvironment":
        """A session lives on the server, which has no way to copy it."""
        raise TypeError("an OpenEnv session cannot be copied")

    async def close(self) -> None:
        """Ends the session."""
        await self._client.close()


def _session(url: str, timeout_s: float) -> Any:
    """A client that connects once: the package's own would go on in a new session, which has not been reset."""
    from openenv.core import GenericEnvClient

    class Session(GenericEnvClient):
        began = False

        async def _connect_async(self) -> Any:
            lost = self.began and (self._ws is None or self._ws.state.name != "OPEN")
            if lost:
                raise ConnectionError("the connection was lost, and with it the session")
            self.began = True
            return await super()._connect_async()

        async def _send(self, message: dict[str, Any]) -> None:
            if self._ws is not None and await _has_message(self._ws):
                raise ConnectionError("the server answered more often than it was asked")
            await super()._send(message)

    return Session(
        base_url=url,
        connect_timeout_s=timeout_s,
        message_timeout_s=timeout_s,
        max_message_size_mb=MOST_BYTES / (1 << 20),
    )


async def _has_message(connection: Any) -> bool:
    """Whether a message has come that nothing waits for; answers bear no number, so it would be the next one's."""
    waiting = asyncio.ensure_future(connection.recv())
    for _ in range(4):  # the loop reads what has arrived, the connection unpacks it, `recv` takes it
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    return not waiting.cancelled() and not waiting.exception()


def observation_text(observation: Mapping[str, Any]) -> str:
    """An observation as the policy reads it: its one text, or all of its fields as JSON."""
    fields = {name: value for name, value in observation.items() if name not in _OWN_FIELDS}
    values = list(fields.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(fields, ensure_ascii=False)


def _payload(written: str, field: str | None) -> dict[str, Any] | None:
    try:
        found = parsed(written)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    return None if field is None else {field: written}


def openenv_source(rest: str) -> Source:
    """The environments of the server at `URL?option=value&...`, whose tasks are seeds or those of a file.

    `field` is the action's field that takes the policy's text, by default the only required one that is text; `seeds`
    how many seeds a split has; `timeout` the seconds that a message may take. The server is asked for its schema.
    """
    try:
        import openenv  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package("openenv") from error

    url, options = split_spec("openenv", rest, known=("field", "seeds", "timeout"))
    count = whole_option("openenv", options, "seeds", SEEDS)
    timeout_s = options.pop("timeout", TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 3600:
        raise ConfigError(f"timeout of openenv: must be seconds in (0, 3600]; got {timeout_s!r}; give a number")
    properties, required = _action_fields(url, timeout_s)
    texts = [name for name in required if properties[name].get("type") == "string"]
    field = options.pop("field", texts[0] if len(texts) == len(required) == 1 else None)
    if field is not None and field not in properties:
        raise ConfigError(
            f"field of openenv: must be one of the action's, {', '.join(properties) or 'none'}; got {field!r}; name one"
        )
    rules = "Every message that you write is one action in an environment."
    if field is None:
        shown = json.dumps({name: schema.get("type", "any") for name, schema in properties.items()})
        rules += f"\nWrite it as one JSON object with these fields: {shown}"
    return Source(
        name=f"openenv:{url}",
        make=lambda task: OpenEnvEnvironment(url, task, field=field, instructions=rules, timeout_s=timeout_s),
        task_of=asked_seed,
        tasks=lambda split: seed_tasks(split, count),
        forks=False,
    )


def _action_fields(url: str, timeout_s: float) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The fields of the server's action, and the required ones. Raises InputError where no OpenEnv server answers."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"openenv: must be followed by a server's URL; got {url!r}; write openenv:http://HOST:PORT")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/schema", timeout=timeout_s) as reply:
            action = parsed(whole_body(reply, time.monotonic() + timeout_s))["action"]
        properties = {name: dict(schema) for name, schema in action["properties"].items() if name not in _OWN_FIELDS}
        return properties, [name for name in action.get("required", ()) if name in properties]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{url} must be an OpenEnv server that tells its schema; got {described(error)}; start it, or check the URL"
        ) from error
