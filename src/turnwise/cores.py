"""Using a machine's cores: several parts of a step at once, each on one thread, or one part on all threads."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

from turnwise.devices import SMALL, num_parameters

PROGRAM = "The following operation failed in the TorchScript interpreter"
"""How the text of an error begins that has the program in it, and in its last line what went wrong."""

P = ParamSpec("P")
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


def fuse_norms(model: torch.nn.Module) -> None:
    """Makes each root-mean-square norm of a small model one operation, where it is the same to the last bit.

    After every operation a thread waits for its turn at the interpreter, and transformers' norm is seven. The weights'
    names and what is saved stay as they are.
    """
    if not has_short_operations(model):
        return
    norm: Any
    for norm in model.modules():
        weight = getattr(norm, "weight", None)
        if hasattr(norm, "variance_epsilon") and isinstance(weight, torch.Tensor) and weight.dtype is torch.float32:
            drawn = torch.Generator().manual_seed(0)
            states, other = (torch.randn(*size, *weight.shape, generator=drawn) for size in ((9,), ()))
            own = torch.func.functional_call(norm, {"weight": other}, (states,))
            if torch.equal(own, torch.nn.functional.rms_norm(states, weight.shape, other, norm.variance_epsilon)):
                norm.forward = functools.partial(_fused_norm, norm)  # which, unlike a method, can be pickled


def _fused_norm(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = norm.weight
    if hidden_states.dtype is weight.dtype is torch.float32 and hidden_states.device.type == "cpu":
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)
    return type(norm).forward(norm, hidden_states)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which on a processor runs without the interpreter, for which threads queue up.

    Two threads of Python with operations of 5 µs take longer than one for all of them; two of TorchScript hardly do.
    The first argument is a tensor. What the function calls is compiled with it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer developed
        try:
            script = torch.jit.script(function)
        except Exception:  # from Python 3.14 on, and in a torch that has dropped it
            return function

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if first.device.type != "cpu":
            return function(*args, **kwargs)
        try:
            return script(*args, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith(PROGRAM):
                raise
            raise type(error)(str(error).rstrip().rpartition("\n")[2].removeprefix("RuntimeError: ")) from error

    return run


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
