"""What the environments from elsewhere have in common: where they come from, their tasks, and how actions are read."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl

from turnwise.env import Environment, Step, TurnLimit
from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.records import parsed
from turnwise.types import Action, Message, Stop, Task, ToolCall, ToolResult

Split = Literal["train", "validation", "test"]
FIRST_SEEDS: Mapping[Split, int] = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
"""The first seed of each split; no two splits share one."""
SEEDS = 256
"""Seeds in a split of an environment that has no tasks but its seeds."""
CALL = "act"
"""What an action is called in the records, where the policy writes it without a name."""
_ACTION = re.compile(r"<action>(.*?)</action>", re.S)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where environments come from."""

    name: str
    make: Callable[[Task], Environment]
    """A fresh environment for one rollout of a task."""
    task_of: Callable[[str], Task]
    """The task that a text on the command line stands for; InputError where it stands for none."""
    tasks: Callable[[Split], Sequence[Task]] | None = None
    """Its own tasks; None where tasks come from a file alone."""
    rewards: tuple[str, ...] = ("environment",)
    """The names by which it may pay turns."""
    forks: bool = True
    """Whether its environments can be copied between two steps."""

    def environment(self, task: Task, max_turns: int) -> Environment:
        """A fresh environment that is left after `max_turns` turns; one that cannot be made fails as it starts.

        Raises ConfigError where the options of its source are wrong, whatever the task.
        """
        try:
            made = self.make(task)
        except ConfigError:
            raise  # no task would do better
        except (Exception, SystemExit) as error:
            made = _Unmade(error)
        return TurnLimit(made, max_turns)


class _Unmade:
    """Stands for an environment that could not be made, so that its rollout alone fails."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def start(self) -> tuple[Message, ...]:
        raise self._error

    def step(self, text: str) -> Step:
        raise self._error


def missing_package(package: str) -> InputError:
    """The error of an environment whose package is not installed."""
    return InputError(f'this environment needs {package}; it is not installed; pip install "turnwise[{package}]"')


# ---------------------------------------------------------------- what stands in --environment


def split_spec(kind: str, rest: str, known: Collection[str] | None) -> tuple[str, dict[str, Any]]:
    """What stands before a `?`, and the options after it: `name=value` pairs joined by `&`, values in JSON or as text.

    Raises ConfigError for options that are not in `known`, which may be None for any.
    """
    head, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if known is not None and name not in known:
            raise unknown_name(f"an option of {kind}:", name, known)
        options[name] = _read(value)
    return head, options


def _read(value: str) -> Any:
    try:
        return parsed(value)
    except ValueError:
        return value


def whole_option(kind: str, options: dict[str, Any], name: str, default: int, low: int = 1) -> int:
    """Takes a whole number out of the options; ConfigError for anything else or a number below `low`."""
    value = options.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} of {kind}: must be a whole number >= {low}; got {value!r}; give one")
    return value


# ------------------------------------------------------------------------------ tasks of seeds


def seed_tasks(split: Split, count: int) -> list[Task]:
    """A task for each of the first `count` seeds of a split."""
    return [seed_task(seed) for seed in range(FIRST_SEEDS[split], FIRST_SEEDS[split] + count)]


def seed_task(seed: int) -> Task:
    return Task(id=f"seed-{seed}", question=f"seed {seed}", metadata={"seed": seed})


def asked_seed(text: str) -> Task:
    """The task of a seed that somebody typed."""
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise InputError(f"a question to an environment of seeds must be a seed; got {text!r}; give a whole number")
    return seed_task(int(text))


def seed_of(task: Task) -> int | None:
    """The task's seed, if it has one. Raises InputError where it is no whole number of at least 0."""
    seed = task.metadata.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise InputError(f"seed of task {task.id!r} must be a whole number >= 0; got {seed!r}; correct the task")
    return seed


def question_of(task: Task) -> str:
    """What the task asks beyond its seed; blank for nothing."""
    return "" if task.question == f"seed {task.metadata.get('seed')}" else task.question


# ------------------------------------------------------------------------- messages and actions


def first_messages(instructions: str, task: Task, observation: str) -> tuple[Message, ...]:
    """The rules as system message; the task's question, if it has one, and the first observation as user message."""
    said = "\n\n".join(part for part in (question_of(task), observation) if part.strip())
    return Message(role="system", content=instructions), Message(role="user", content=said)


def read_action(text: str) -> tuple[str, Action]:
    """The action that a message writes, and its record: what stands in <action>, the last one, or else all of it."""
    blocks = list(_ACTION.finditer(text))
    action = (blocks[-1][1] if blocks else text).strip()
    reasoning = text[: blocks[-1].start()].strip() if blocks else ""
    return action, Action(reasoning=reasoning or None, tool_calls=(ToolCall(name=CALL, arguments={"action": action}),))


def step_of(
    action: Action,
    observation: str,
    *,
    error: str | None = None,
    stop: Stop | None = None,
    reward: float | None = None,
    rewards: Mapping[str, float] | None = None,
    success: bool | None = None,
) -> Step:
    """The step that an observation answers; `reward` is paid as `environment`, and absent where it is None."""
    paid = {} if reward is None else {"environment": float(reward)}
    return Step(
        action=action,
        results=(ToolResult(text=observation, error=error),),
        reply=() if stop else (Message(role="user", content=observation),),
        stop=stop,
        rewards={**paid, **(rewards or {})},
        success=success,
    )
