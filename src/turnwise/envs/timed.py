"""Environments whose code may hang: it runs beside the rollouts, each call for so many seconds at most."""

import functools
from collections.abc import Callable
from typing import Any

from turnwise.background import Failure, done_beside
from turnwise.env import Environment, Step, forked, seeded, state_of
from turnwise.types import Message


class Timed:
    """An environment that is made, started and asked in threads; a call that takes too long is a TimeoutError.

    The thread, which cannot be stopped, is left alone with its environment, which is not called again.
    """

    def __init__(self, make: Callable[[], Environment], timeout_s: float) -> None:
        self._make = make
        self._timeout_s = timeout_s
        self._environment: Environment | None = None
        self._seed: int | None = None

    def use_seed(self, seed: int) -> None:
        """Keeps the rollout's seed until there is an environment."""
        self._seed = seed

    async def start(self) -> tuple[Message, ...]:
        """Makes the environment; its first messages."""
        environment: Environment = await self._done(self._make)
        if self._seed is not None:
            seeded(environment, self._seed)
        messages = await self._done(environment.start)
        self._environment = environment
        return messages

    async def step(self, text: str) -> Step:
        """The environment's step."""
        if self._environment is None:
            raise RuntimeError("an environment that did not answer in time is not asked again")
        return await self._done(functools.partial(self._environment.step, text))

    def fork(self) -> "Timed":
        """A copy of the environment."""
        assert self._environment is not None, "what has not started does not branch"
        twin = Timed(self._make, self._timeout_s)
        twin._environment = forked(self._environment)
        return twin

    def state_key(self) -> str | None:
        """The environment's name of its state."""
        return None if self._environment is None else state_of(self._environment)

    async def close(self) -> None:
        """Closes the environment, unless it hangs."""
        close = getattr(self._environment, "close", None)
        if close is not None:
            await done_beside(close, self._timeout_s)

    async def _done(self, call: Callable[[], Any]) -> Any:
        value = await done_beside(call, self._timeout_s)
        if isinstance(value, Failure):
            if isinstance(value.error, TimeoutError):
                self._environment = None
            if isinstance(value.error, SystemExit):
                raise RuntimeError(f"it called exit({value.error.code!r})") from value.error
            raise value.error
        return value
