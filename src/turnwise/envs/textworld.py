"""TextWorld's games, made on the spot from a seed or read from files: text adventures of many turns."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from turnwise.env import Step
from turnwise.envs.source import (
    Source,
    Split,
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
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.search import default_cache
from turnwise.types import Message, Task

GAMES = 16
"""Games in a split, unless told otherwise: each is compiled once, which takes seconds."""
RULES = "You play a text adventure. Every message that you write is one command to the game."
_PROMPT = re.compile(r"\n>\s*(-=[^\n]*)?\s*$")


class TextWorldEnvironment:
    """A compiled TextWorld game, played once.

    It pays the points that a command earns as `environment`, and as `progress` 1, 0 or -1 where the command brings the
    end of the shortest solution nearer, leaves it as far, or takes it away. The game says whether it was won. The
    commands that make sense are listed below every observation unless `commands` is False.
    """

    def __init__(self, game: Path, task: Task, *, commands: bool = True) -> None:
        import textworld

        asked = ("feedback", "description", "objective", "score", "won", "lost", "facts", "intermediate_reward")
        infos = textworld.EnvInfos(**dict.fromkeys(asked, True), admissible_commands=commands)
        with _quiet():
            self._environment: Any = textworld.start(str(game), infos)
        self._task = task
        self._commands = commands
        self._state: Any = None

    def start(self) -> tuple[Message, ...]:
        """The rules as system message; objective and first room as user message."""
        with _quiet():
            self._state = self._environment.reset()
        return first_messages(RULES, self._task, self._shown(f"{self._state.objective}\n\n{self._state.description}"))

    async def step(self, text: str) -> Step:
        """One command to the game."""
        command, action = read_action(text)
        before = self._state.score
        with _quiet():
            self._state, score, done = self._environment.step(" ".join(command.split()))
        return step_of(
            action,
            self._shown(_PROMPT.sub("", self._state.feedback)),
            stop="done" if done else None,
            reward=score - before,
            rewards={"progress": float(self._state.intermediate_reward)},
            success=bool(self._state.won),
        )

    def state_key(self) -> str:
        """The facts of the game's world."""
        return hashlib.blake2b("\n".join(sorted(map(str, self._state.facts))).encode(), digest_size=8).hexdigest()

    def fork(self) -> "TextWorldEnvironment":
        """A copy of the game as it stands."""
        twin = object.__new__(TextWorldEnvironment)
        with _quiet():
            twin.__dict__ = {**self.__dict__, "_environment": self._environment.copy()}
        return twin

    def close(self) -> None:
        """Ends the game."""
        self._environment.close()

    def _shown(self, text: str) -> str:
        shown = re.sub(r"\n{3,}", "\n\n", text).strip()
        if not self._commands or not self._state.admissible_commands:
            return shown
        return f"{shown}\n\nCommands: {'; '.join(self._state.admissible_commands)}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the interpreter's warnings, as of a game that it has no walkthrough for, or a command that it cuts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="jericho|textworld")
        yield


def make_game(seed: int, *, rooms: int = 3, objects: int = 4, quest: int = 3, quests: int = 1) -> Path:
    """The compiled game of a seed, from the user's cache folder where it has been made before.

    `quest` is how many commands each of `quests` quests takes; each is worth a point. Raises InputError where there is
    no such game.
    """
    import textworld

    folder = default_cache() / "textworld"
    name = f"{textworld.__version__}-{rooms}-{objects}-{quest}-{quests}-{seed}"
    made = folder / f"{name}.z8"
    if made.is_file() and made.with_suffix(".json").is_file():
        return made
    options = textworld.GameOptions()
    options.seeds = seed
    options.nb_rooms, options.nb_objects, options.nb_parallel_quests = rooms, objects, quests
    options.quest_length = quest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        raise RunError(f"{folder} must be writable, for games; got {error.strerror}; set XDG_CACHE_HOME") from error
    try:
        options.path = str(workshop / f"{name}.z8")
        textworld.make(options)
        for suffix in (".json", ".z8"):  # whole at once; the game last, as it is looked for
            os.replace(workshop / f"{name}{suffix}", folder / f"{name}{suffix}")
    except Exception as error:
        raise InputError(
            f"a game of {rooms} rooms, {objects} objects and {quests} quests of {quest} commands must be possible; got "
            f"{describe(error)}; ask for another"
        ) from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return made


def textworld_source(rest: str) -> Source:
    """The games of `FOLDER?option=value&...`, or those made on the spot where there is no folder (or file).

    Options: `rooms`, `objects`, `quest` (commands to its end), `quests` and `games` (in a split) of games that are
    made; `commands=false` hides the commands that make sense.
    """
    try:
        import textworld  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package("textworld") from error

    where, options = split_spec("textworld", rest, ("rooms", "objects", "quest", "quests", "games", "commands"))
    commands = options.pop("commands", True)
    if not isinstance(commands, bool):
        raise ConfigError(f"commands of textworld: must be true or false; got {commands!r}; give one")
    if where:
        if options:
            raise ConfigError(f"{next(iter(options))} of textworld: must go without a folder of games; leave one out")
        return _source_of_files(Path(where), commands)
    size = {name: whole_option("textworld", options, name, least) for name, least in _SIZES.items()}
    count = whole_option("textworld", options, "games", GAMES)

    def made(task: Task) -> TextWorldEnvironment:
        seed = seed_of(task)
        if seed is None:
            raise InputError(f"task {task.id!r} must have a seed, of which its game is made; add a field seed")
        return TextWorldEnvironment(make_game(seed, **size), task, commands=commands)

    return Source(
        name=f"textworld:{rest}",
        make=made,
        task_of=asked_seed,
        tasks=lambda split: seed_tasks(split, count),
        rewards=("environment", "progress"),
    )


_SIZES = {"rooms": 3, "objects": 4, "quest": 3, "quests": 1}
"""What a game has that is made on the spot, unless told otherwise."""


def _source_of_files(where: Path, commands: bool) -> Source:
    """The games in a folder, or one game; each is a task, and all of them are played in every split."""
    files = sorted(where.glob("*.z8")) if where.is_dir() else [where]
    files = [file for file in files if file.is_file() and file.with_suffix(".json").is_file()]
    if not files:
        raise InputError(f"{where} must hold TextWorld games, NAME.z8 with NAME.json; it has none; check the path")
    by_name = {file.stem: file for file in files}

    def game(task: Task) -> Path:
        if task.id not in by_name:
            raise InputError(f"a task must be a game of {where}; got {task.id!r}; choose one of {', '.join(by_name)}")
        return by_name[task.id]

    def tasks(_split: Split) -> Sequence[Task]:
        return [Task(id=name, question="") for name in by_name]

    return Source(
        name=f"textworld:{where}",
        make=lambda task: TextWorldEnvironment(game(task), task, commands=commands),
        task_of=lambda text: Task(id=text.strip(), question=""),
        tasks=tasks,
        rewards=("environment", "progress"),
    )
