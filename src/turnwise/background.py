"""Work beside the event loop that plays: a thread for each call of a function, one lasting loop for coroutines.

So nothing that a tool does holds up the rollouts or the model. The loop of the coroutines lives as long as the process,
and with it every connection that was opened on it, while each step of a training has an event loop of its own.
"""

import asyncio
import contextlib
import functools
import inspect
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Failure:
    """What some work raised; `SystemExit` and the like included, which must not reach the thread that does it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def done_beside(function: Callable[[], Any], timeout_s: float | None) -> Any:
    """The value or `Failure` of a call, for which this event loop does not stand still.

    After `timeout_s` it is given up, as a TimeoutError's `Failure`. A coroutine is cancelled then, and where this one
    is cancelled; neither waits for that, and a thread, which cannot be stopped, goes on by itself.
    """
    here = asyncio.get_running_loop()
    waiting: asyncio.Future[Any] = here.create_future()
    lane = _lane(here)

    def tell(value: Any) -> None:
        lane.put(lambda: None if waiting.done() else waiting.set_result(value))

    def give_up() -> None:
        if not waiting.done():
            waiting.set_result(Failure(TimeoutError(f"it took longer than {timeout_s:g} s")))
            stop()

    stop = _begun(function, tell)
    deadline = None if timeout_s is None else lane.deadlines_of(timeout_s).add(here, give_up)
    try:
        return await waiting
    except asyncio.CancelledError:
        stop()
        raise
    finally:
        if deadline is not None:
            deadline.clear()


def waited_for(function: Callable[[], Any]) -> Any:
    """The value or `Failure` of a call, for code without an event loop."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    _begun(function, told.put)
    return told.get()


def _begun(function: Callable[[], Any], tell: Callable[[Any], None]) -> Callable[[], None]:
    """Starts a call, whose value or `Failure` is told from another thread; what is returned gives it up."""
    if not inspect.iscoroutinefunction(function):
        _in_thread(functools.partial(_run, function, tell), tell)
        return lambda: None
    loop = lasting_loop()
    lane = _lane(loop)
    tasks: list[asyncio.Task[Any]] = []
    lane.put(lambda: tasks.append(loop.create_task(_told(function, tell))))
    return lambda: lane.put(lambda: tasks[0].cancel())


_IDLE: list[queue.SimpleQueue[Callable[[], None]]] = []
"""The inboxes of threads without work, the latest last. A list's own operations are whole: a lock would be one more
thing that a thousand threads wait for."""
_IDLE_S = 10.0
"""Seconds that a thread waits for new work before it ends."""


def _in_thread(work: Callable[[], None], tell: Callable[[Any], None]) -> None:
    """Does work in an idle thread or a new one. They are daemons: one that hangs does not keep the process alive."""
    try:
        _IDLE.pop().put(work)
        return
    except IndexError:  # none is idle
        pass
    try:
        threading.Thread(target=_works, args=(work,), name="turnwise-tool", daemon=True).start()
    except RuntimeError as error:  # no more threads
        tell(Failure(error))


def _works(work: Callable[[], None]) -> None:
    inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    while True:
        work()
        _IDLE.append(inbox)
        try:
            work = inbox.get(timeout=_IDLE_S)
        except queue.Empty:
            try:
                _IDLE.remove(inbox)
                return
            except ValueError:
                work = inbox.get()  # it was chosen in this very moment


def _run(function: Callable[[], Any], tell: Callable[[Any], None]) -> None:
    try:
        value = function()
        if inspect.isawaitable(value):
            value = waited_for(functools.partial(_awaited, value))
    except BaseException as error:
        value = Failure(error)
    tell(value)


async def _told(function: Callable[[], Any], tell: Callable[[Any], None]) -> None:
    try:
        value = await function()
    except BaseException as error:
        value = Failure(error)
    tell(value)


async def _awaited(value: Any) -> Any:
    return await value


class _Deadlines:
    """Calls of one event loop that may take equally long: the first that began is the first that is given up.

    So one timer serves all of them, and a call that ends in time has none to cancel.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._queue: deque[tuple[float, list[Callable[[], None]]]] = deque()
        self._is_set = False

    def add(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[], None]) -> list[Callable[[], None]]:
        """Calls `give_up` when the time is over, unless the list that is returned is empty by then."""
        while self._queue and not self._queue[0][1]:
            self._queue.popleft()
        entry = [give_up]
        self._queue.append((loop.time() + self._timeout_s, entry))
        if not self._is_set:
            self._set(loop)
        return entry

    def _set(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_set = True
        loop.call_at(self._queue[0][0], self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_set = False
        while self._queue and (not self._queue[0][1] or self._queue[0][0] <= loop.time()):
            for give_up in self._queue.popleft()[1]:
                give_up()
        if self._queue:
            self._set(loop)


HANDED_AT_ONCE = 64
"""After so many calls an event loop hands them over; the tools of the first rollouts work while the rest go on."""


class _Lane:
    """Calls that other threads hand to an event loop; it is woken once for all that have come.

    What an event loop hands over waits until all that is ready there had its turn, or for `HANDED_AT_ONCE` calls: a
    thousand rollouts that go on at the same moment wake the other loop a few times. There is no lock: a call is in the
    queue before it is asked whether the loop will come, which says so no longer before it empties the queue.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._calls: deque[Callable[[], Any]] = deque()
        self._comes = False
        """Whether the loop has been woken and has not yet begun to empty the queue."""
        self._waker: asyncio.AbstractEventLoop | None = None
        """The event loop that will wake it when all that is ready there had its turn."""
        self._deadlines: dict[float, _Deadlines] = {}

    def put(self, call: Callable[[], Any]) -> None:
        self._calls.append(call)
        if self._comes:
            return
        here = asyncio._get_running_loop()
        if here is None or len(self._calls) >= HANDED_AT_ONCE:  # a thread without a loop
            self._wake()
        elif self._waker is not here:
            self._waker = here
            here.call_soon(self._wake)

    def deadlines_of(self, timeout_s: float) -> _Deadlines:
        """Those of the loop's calls that may take so long."""
        found = self._deadlines.get(timeout_s)
        if found is None:
            found = self._deadlines[timeout_s] = _Deadlines(timeout_s)
        return found

    def _wake(self) -> None:
        self._waker = None
        loop = self._loop()
        if loop is not None and self._calls and not self._comes:
            self._comes = True
            with contextlib.suppress(RuntimeError):  # of a loop that is closed: nobody waits there
                loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._comes = False
        for _ in range(len(self._calls)):
            self._calls.popleft()()


_LANES: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = weakref.WeakKeyDictionary()
_STARTING = threading.RLock()


def _lane(loop: asyncio.AbstractEventLoop) -> _Lane:
    known = _LANES.get(loop)
    if known is not None:
        return known
    with _STARTING:
        lane = _LANES.get(loop)
        if lane is None:
            lane = _LANES[loop] = _Lane(loop)
        return lane


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="turnwise-tools", daemon=True).start()
    return loop


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
