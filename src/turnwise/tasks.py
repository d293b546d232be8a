"""Task files: questions with their answers, one JSON object a line.

    {"id": "q1", "question": "What is the capital of Kenya?", "answers": ["Nairobi"]}

`answers` may be one string and may be called `answer`; `kind` is optional; every other field
becomes the task's metadata. Tasks of an environment that decides by itself what is right need neither
question nor answers. A file whose name ends in `.gz` is compressed. Standard library only.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turnwise.errors import InputError
from turnwise.types import Task

Record = dict[str, Any]
_FIELDS = ("id", "question", "answers", "answer", "kind")
_WORD = re.compile(r"\w+")


# -------------------------------------------------------------------------- lines of JSON


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 text file, `.gz` included; blank lines are left out.

    Raises InputError where the file is missing, is no text, or is cut off.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a file; there is none; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: the text must be UTF-8; got byte {error.object[error.start]:#04x}; convert the file"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file; line {number + 1}: {error}; fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} must be a readable file; got {error.strerror}; check the path") from error


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The JSON objects of a JSON-lines file, each with its line number.

    Raises InputError at the first line that holds no JSON object, and where there is none at all.
    """
    empty = True
    for number, text in read_lines(path):
        empty = False
        yield number, record_of_line(f"{path}:{number}", text)
    if empty:
        raise InputError(f"{path} must hold one JSON object a line; it is empty; fill the file")


def record_of_line(where: str, text: str) -> Record:
    """The JSON object of a line; `where` begins the text of an InputError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(
            f"{where}: each line must be one JSON object; got {shown(text)} ({reason}); write JSON lines"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: each line must be one JSON object; got {shown(value)}; write JSON lines")
    return value


def text_field(record: Record, name: str, where: str) -> str:
    """A field that must be a string with something in it; InputError otherwise."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    raise field_error(where, name, "a string that is not blank", record)


def id_field(record: Record, where: str) -> str:
    """The field `id`: a string that is not blank, or a whole number, which becomes a string."""
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, "id", where)


def note_id(name: str, path: Path, number: int, seen: dict[str, int]) -> None:
    """Writes an id's line number into `seen`; InputError where an earlier line has the id."""
    if name in seen:
        raise InputError(
            f"{path}:{number}: field 'id' must be unique; got {name!r}, which line {seen[name]} has too; rename one"
        )
    seen[name] = number


def field_error(where: str, name: str, expected: str, record: Record) -> InputError:
    """The error of a field that does not hold what it must."""
    if name in record:
        came = f"got {shown(record[name])}"
    else:
        came = f"it is missing among the fields {shown(', '.join(record) or 'none')}"
    return InputError(f"{where}: field {name!r} must be {expected}; {came}; correct the line")


def shown(value: object) -> str:
    """A value as JSON on one line, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------- tasks


def load_tasks(path: str | Path, *, answered: bool = True) -> list[Task]:
    """The tasks of a JSON-lines file, in its order; without `answered` an `id` is all that they must have.

    Raises InputError, naming file, line and field, for a record that is no task, an id that comes
    twice, and a file without tasks.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    tasks = []
    for number, record in read_records(path):
        task = task_from_record(record, f"{path}:{number}", answered=answered)
        note_id(task.id, path, number, seen)
        tasks.append(task)
    return tasks


def task_from_record(record: Record, where: str, *, answered: bool = True) -> Task:
    """The task that a JSON object describes, with question and answers where it must be `answered`.

    `where` begins the text of an InputError.
    """
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise field_error(where, "kind", "a string", record)
    return Task(
        id=id_field(record, where),
        question=text_field(record, "question", where) if answered or "question" in record else "",
        answers=_answers(record, where) if answered or {"answer", "answers"} & record.keys() else (),
        kind=kind or "",
        metadata={name: value for name, value in record.items() if name not in _FIELDS},
    )


def _answers(record: Record, where: str) -> tuple[str, ...]:
    name = "answer" if "answer" in record and "answers" not in record else "answers"
    value = record.get(name)
    answers = [value] if isinstance(value, str) else value
    good = isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)
    if not good or not answers:
        raise field_error(where, name, "a string or a list of at least one, none blank", record)
    return tuple(dict.fromkeys(answers))


def task_line(task: Task) -> str:
    """The task as one line of JSON; `load_tasks` reads it back equal."""
    kind = {"kind": task.kind} if task.kind else {}
    record = {"id": task.id, "question": task.question, "answers": task.answers}
    return json.dumps({**record, **kind, **task.metadata}, ensure_ascii=False)


# ---------------------------------------------------------------- can the corpus answer them


def check_answers_in_corpus(tasks: Sequence[Task], texts: Iterable[str]) -> float:
    """The share of tasks with an answer that some text holds as whole words, case ignored.

    Stops reading once every task has one. Raises InputError where no text answers any task: the
    questions and the corpus do not belong together.
    """
    if not tasks:
        raise InputError("the tasks must be at least one; got none; give a file with questions")
    open_answers: Answers = {}
    answered: set[int] = set()
    for number, text in enumerate(texts):
        if number in (0, 1_000, 10_000, 100_000):  # leaves out what is answered by now
            open_answers = _answers_by_first_word(tasks, answered)
        answered |= _answered(_words(text), open_answers)
        if len(answered) == len(tasks):
            break
    if not answered:
        raise InputError(
            f"the corpus must hold an answer of at least one task; it holds none of {len(tasks)} "
            f"tasks, such as {tasks[0].answers[0]!r}; give the corpus that belongs to the questions"
        )
    return len(answered) / len(tasks)


Answers = dict[str, dict[int, dict[tuple[str, ...], set[int]]]]
"""By first word and number of words: each answer, and the tasks (by position) that it answers."""


def _answers_by_first_word(tasks: Sequence[Task], but: set[int]) -> Answers:
    found: Answers = {}
    for position, task in enumerate(tasks):
        if position in but:
            continue
        for words in filter(None, map(_words, task.answers)):
            by_length = found.setdefault(words[0], {})
            by_length.setdefault(len(words), {}).setdefault(words, set()).add(position)
    return found


def _answered(words: tuple[str, ...], answers: Answers) -> set[int]:
    """The tasks that the words of one text answer; their answers leave `answers`."""
    positions: set[int] = set()
    for start, word in enumerate(words):
        for length, here in answers.get(word, {}).items():
            positions |= here.pop(words[start : start + length], set())
    return positions


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))
