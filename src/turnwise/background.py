"""Work beside the event loop that plays: a thread for each call of a function, one lasting loop for coroutines.

So nothing that a tool does holds up the rollouts or the model. The loop of the coroutines lives as long as the process,
and with it every connection that was opened on it, while each step of a training has an event loop of its own.
"""

import asyncio
import functools
import inspect
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class Failure:
    """What some work raised; `SystemExit` and the like included, which must not reach the thread that does it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def begin(function: Callable[[], Any]) -> Future[Any]:
    """Starts a call; its future holds the value or a `Failure`. A coroutine is awaited on the lasting loop.

    Cancelling the future cancels a coroutine; a thread cannot be stopped and goes on by itself.
    """
    if inspect.iscoroutinefunction(function):
        return asyncio.run_coroutine_threadsafe(_caught(function()), lasting_loop())
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            value = function()
            if inspect.isawaitable(value):
                value = asyncio.run_coroutine_threadsafe(_caught(_awaited(value)), lasting_loop()).result()
        except BaseException as error:
            value = Failure(error)
        future.set_result(value)

    try:
        threading.Thread(target=run, name="turnwise-tool", daemon=True).start()
    except RuntimeError as error:  # no more threads
        future.set_result(Failure(error))
    return future


async def finished(work: Future[Any], timeout_s: float | None) -> Any:
    """The value or `Failure` of begun work; after `timeout_s` it is given up, as a TimeoutError's `Failure`."""
    waiting = asyncio.wrap_future(work)
    try:
        done, _ = await asyncio.wait({waiting}, timeout=timeout_s)
    except asyncio.CancelledError:
        waiting.cancel()
        raise
    if not done:
        waiting.cancel()
        return Failure(TimeoutError(f"it took longer than {timeout_s:g} s"))
    if waiting.cancelled():  # by the work itself
        return Failure(asyncio.CancelledError())
    return waiting.result()


async def done_beside(function: Callable[[], Any], timeout_s: float | None) -> Any:
    """The value or `Failure` of a call that this event loop does not wait for in place."""
    return await finished(begin(function), timeout_s)


async def _caught(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return Failure(error)


async def _awaited(value: Any) -> Any:
    return await value


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="turnwise-tools", daemon=True).start()
    return loop


_STARTING = threading.Lock()


def lasting_loop() -> asyncio.AbstractEventLoop:
    """The event loop of the process on which coroutines of tools run."""
    with _STARTING:
        return _started_loop()


class Gate:
    """At most `places` holders at once, whichever event loop they run on; who waits longest comes next."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._queue: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        place: Future[None] = Future()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            self._queue.append(place)
        try:
            await asyncio.wrap_future(place)
        except asyncio.CancelledError:
            if not place.cancel() and not place.cancelled():  # it was given a place in this very moment
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            while self._queue:
                if self._queue[0].set_running_or_notify_cancel():
                    self._queue.popleft().set_result(None)
                    return
                self._queue.popleft()
            self._free += 1
