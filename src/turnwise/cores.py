"""Using a machine's cores: several parts of a step at once, each on one thread, or one part on all threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from turnwise.devices import SMALL, num_parameters

T = TypeVar("T")
R = TypeVar("R")


def parts_at_once(model: torch.nn.Module, threads: int) -> int:
    """How many parts of a step to compute at once where `threads` cores may be used.

    The operations of a small model are so short that two threads take as long as one; there each core computes a part
    of its own. A large model's parts come one after the other, on all threads, and so do those on a GPU.
    """
    return threads if has_short_operations(model) else 1


def has_short_operations(model: torch.nn.Module) -> bool:
    """Whether the model is small and on a processor."""
    return num_parameters(model) < SMALL and next(model.parameters()).device.type == "cpu"


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, at_once: int) -> Iterator[R]:
    """`function` of every item, in order; `at_once` of them at a time, each in a thread of its own.

    There torch computes an operation in the thread that asks for it alone. Its setting is the process's: where it is
    one thread anyway it is left alone, so that two threads may do this at the same time.
    """
    if at_once == 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield from threads.map(function, items)
    finally:
        if before != 1:
            torch.set_num_threads(before)
