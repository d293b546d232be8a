"""Environments in the manner of Gymnasium, with observations and actions as text.

    reset(seed=..., options=...) -> (observation, info)
    step(action) -> (observation, reward, terminated, truncated, info)

Anything with these two methods will do; gymnasium itself is imported only to make an environment by its id.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

from turnwise.env import Step
from turnwise.envs.source import (
    SEEDS,
    Source,
    asked_seed,
    describe,
    first_messages,
    missing_package,
    read_action,
    seed_of,
    seed_tasks,
    split_spec,
    step_of,
    whole_option,
)
from turnwise.errors import ConfigError, InputError
from turnwise.types import Message, Stop, Task

FLAGS = ("success", "is_success", "won")
"""Where the environment's `info` may say that the task is solved."""
_MARKED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", re.S)


class GymEnvironment:
    """A Gymnasium-style environment played once, with its step rewards as the component `environment`.

    An observation that is no text is shown by `render()`, where that returns text; what is marked there by a colour
    stands in square brackets. `actions` are the words for the actions 0, 1, ...; without them a discrete action space
    takes numbers, and any other one the policy's text as it is. A message that is no action is answered by an error,
    costs its turn and is paid nothing. `terminated` is stop `done`, `truncated` is `max_turns`.
    """

    def __init__(
        self, environment: Any, task: Task, *, actions: Sequence[str] | None = None, instructions: str = ""
    ) -> None:
        self._environment = environment
        self._task = task
        self._actions = _words(environment, actions)
        self._instructions = instructions
        self._observation: Any = None

    def start(self) -> tuple[Message, ...]:
        """The rules as system message, the first observation as user message."""
        given = {"seed": seed_of(self._task), "options": self._task.metadata.get("options")}
        self._observation, _ = self._environment.reset(**{k: v for k, v in given.items() if v is not None})
        rules = [self._instructions, "Every message that you write is one action in an environment."]
        if self._actions:
            rules.append(f"Actions: {', '.join(self._actions)}.")
        return first_messages("\n".join(filter(None, rules)), self._task, self._shown())

    async def step(self, text: str) -> Step:
        """One step with the action that the message writes."""
        written, action = read_action(text)
        if self._actions:
            number = self._actions.get(written.lower())
            if number is None:
                known = f"the action must be one of {', '.join(self._actions)}"
                return step_of(action, f"Error: {known}", error="bad_arguments")
            chosen: Any = number
        else:
            chosen = written
            contains = getattr(getattr(self._environment, "action_space", None), "contains", None)
            if contains is not None and not contains(written):
                return step_of(action, "Error: the action is none that the environment takes", error="bad_arguments")
        self._observation, reward, terminated, truncated, info = self._environment.step(chosen)
        stop: Stop | None = "done" if terminated else "max_turns" if truncated else None
        flags = [info[name] for name in FLAGS if info.get(name) is not None]
        success = bool(flags[0]) if flags else None
        return step_of(action, self._shown(), stop=stop, reward=reward, success=success)

    def state_key(self) -> str:
        """The observation itself."""
        return repr(self._observation)

    def fork(self) -> "GymEnvironment":
        """A copy of the environment as it stands."""
        twin = copy.copy(self)
        twin._environment = copy.deepcopy(self._environment)
        return twin

    def close(self) -> None:
        """Closes the environment, if it can be."""
        getattr(self._environment, "close", lambda: None)()

    def _shown(self) -> str:
        if isinstance(self._observation, str):
            return self._observation
        shown = self._environment.render() if hasattr(self._environment, "render") else None
        if not isinstance(shown, str):
            raise TypeError(f"an observation must be text, or render() return text; got {self._observation!r}")
        return _MARKED.sub(r"[\1]", shown).strip()


def _words(environment: Any, actions: Sequence[str] | None) -> dict[str, int]:
    """The words for the actions of a discrete space, by number; empty where any text is an action."""
    space = getattr(environment, "action_space", None)
    count, first = getattr(space, "n", None), int(getattr(space, "start", 0))
    if actions is None:
        return {} if count is None else {str(first + k): first + k for k in range(int(count))}
    if count is not None and len(actions) != count:
        raise ConfigError(f"actions must be a word for each of {count} actions; got {len(actions)}; name them all")
    return {word.strip().lower(): first + k for k, word in enumerate(actions)}


def gym_source(rest: str) -> Source:
    """The environments of `ID?option=value&...`, whose tasks are seeds.

    `actions` are words for the actions, joined by commas, `seeds` how many seeds a split has; the other options are
    the environment's own.
    """
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise missing_package("gymnasium") from error

    name, options = split_spec("gym", rest, known=None)
    count = whole_option("gym", options, "seeds", SEEDS)
    actions = options.pop("actions", None)
    words = None if actions is None else [word.strip() for word in str(actions).split(",")]

    def made() -> Any:
        try:
            plain = gymnasium.make(name, disable_env_checker=True, **options)
            if isinstance(plain.observation_space, gymnasium.spaces.Text) or "render_mode" in options:
                return plain
            if "ansi" in plain.metadata.get("render_modes", ()):
                return gymnasium.make(name, disable_env_checker=True, render_mode="ansi", **options)
        except (gymnasium.error.Error, TypeError, ImportError) as error:
            raise InputError(
                f"gym:{name} must name an environment; got {describe(error)}; check id and options"
            ) from error
        raise InputError(
            f"gym:{name} must have observations of text, or a rendering as text (ansi); it has neither; wrap it in a "
            "module with make(task) (see docs/environments.md)"
        )

    space = made().action_space
    if not isinstance(space, gymnasium.spaces.Text | gymnasium.spaces.Discrete):
        raise InputError(
            f"gym:{name} must have actions of text or discrete ones; got {space}; wrap it in a module with make(task)"
        )
    return Source(
        name=f"gym:{rest}",
        make=lambda task: GymEnvironment(made(), task, actions=words),
        task_of=asked_seed,
        tasks=lambda split: seed_tasks(split, count),
    )
