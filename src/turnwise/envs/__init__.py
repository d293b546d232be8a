"""Environments from elsewhere: a module of the user's, Gymnasium, OpenEnv, TextWorld; see docs/environments.md."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turnwise.env import Environment
from turnwise.envs.source import FIRST_SEEDS, Source, Split
from turnwise.envs.timed import Timed
from turnwise.errors import ConfigError, InputError, described
from turnwise.tool_files import load_module
from turnwise.types import Task

__all__ = ["Source", "load_source"]


def load_source(spec: str) -> Source:
    """What a value of `--environment` stands for: a Python file, or `gym:`, `openenv:` or `textworld:` and a name.

    Raises InputError where it cannot be used: a file without `make`, a package that is not installed, a server that
    does not answer, options that there are not.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](rest)
    if spec.endswith(".py"):
        return _module_source(spec)
    raise ConfigError(
        f"environment must be a Python file, or begin with {', '.join(f'{name}:' for name in _KINDS)}; got {spec!r}; "
        "see docs/environments.md"
    )


def _gym(rest: str) -> Source:
    from turnwise.envs.gym import gym_source

    return gym_source(rest)


def _openenv(rest: str) -> Source:
    from turnwise.envs.openenv import openenv_source

    return openenv_source(rest)


def _textworld(rest: str) -> Source:
    from turnwise.envs.textworld import textworld_source

    return textworld_source(rest)


_KINDS: Mapping[str, Callable[[str], Source]] = {"gym": _gym, "openenv": _openenv, "textworld": _textworld}


def _module_source(path: str) -> Source:
    """The environments of a Python file: `make(task)`, perhaps `tasks(split)`, the names of its REWARDS, TIMEOUT_S."""
    module = load_module(path)
    timeout_s = getattr(module, "TIMEOUT_S", None)
    if timeout_s is not None and not (type(timeout_s) in (int, float) and 0 < timeout_s < math.inf):
        raise ConfigError(f"TIMEOUT_S in {path} must be seconds > 0; got {timeout_s!r}; give a number, or leave it out")
    make, tasks, rewards = (getattr(module, name, None) for name in ("make", "tasks", "REWARDS"))
    if not callable(make):
        raise ConfigError(f"{path} must define make(task), which returns an environment; it does not; write one")
    _check_takes_one(path, "make", "task", make)
    if tasks is not None and not callable(tasks):
        raise ConfigError(f"tasks in {path} must be a function of a split; got {tasks!r}; write one, or rename it")
    if tasks is not None:
        _check_takes_one(path, "tasks", "split", tasks)
    rewards = ("environment",) if rewards is None else rewards
    if not (isinstance(rewards, list | tuple) and rewards and all(isinstance(name, str) for name in rewards)):
        raise ConfigError(f"REWARDS in {path} must be a list of names; got {rewards!r}; name what the environment pays")

    def made(task: Task) -> Environment:
        environment: Any = make(task)
        if not all(callable(getattr(environment, name, None)) for name in ("start", "step")):
            raise InputError(
                f"make in {path} must return an environment with start() and step(text); got {environment!r}; "
                "see docs/environments.md"
            )
        return environment

    return Source(
        name=path,
        make=made if timeout_s is None else lambda task: Timed(functools.partial(made, task), timeout_s),
        tasks=None if tasks is None else lambda split: _own_tasks(path, tasks, split),
        task_of=lambda text: _asked(path, tasks, text),
        rewards=tuple(rewards),
    )


def _asked(path: str, tasks: Callable[[Split], Any] | None, text: str) -> Task:
    """The module's task of that id or question, else a question of its own."""
    own = (task for split in FIRST_SEEDS for task in (_own_tasks(path, tasks, split) if tasks else ()))
    return next((t for t in own if text.strip() in (t.id, t.question.strip())), Task(id="question", question=text))


def _check_takes_one(path: str, name: str, argument: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"{name} in {path} must take ({argument}); got {inspect.signature(function)}; change its parameters"
        ) from error


def _own_tasks(path: str, tasks: Callable[[Split], Any], split: Split) -> Sequence[Task]:
    try:
        found = list(tasks(split))
    except (Exception, SystemExit) as error:
        raise InputError(f"tasks({split!r}) in {path} must not fail; got {described(error)}; correct it") from error
    if not all(isinstance(task, Task) for task in found):
        raise InputError(f"tasks({split!r}) in {path} must be turnwise.Task records; got {found[0]!r}; return those")
    return found
