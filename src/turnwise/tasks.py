"""Tasks out of files and data sets: questions with their answers.

    {"id": "q1", "question": "What is the capital of Kenya?", "answers": ["Nairobi"]}

`answers` may be one string and may be called `answer`; `kind` is optional, and `id` too where no record has one; every
other field becomes the task's metadata. Records of the public question sets are read as they are
(`turnwise.question_sets`), and columns of other names by a mapping. Where records come from, `turnwise.records` says.
Tasks of an environment that decides by itself what is right need neither question nor answers.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.errors import ConfigError, InputError
from turnwise.question_sets import questions_of, recognised
from turnwise.records import Record, field_error, id_field, note_id, read_rows, text_field
from turnwise.types import Task

_FIELDS = ("id", "question", "answers", "answer", "kind")
MAPPED = ("id", "question", "answers", "kind")
"""The fields that columns of other names can stand for."""
PLAIN = "plain"
"""The format of records with the fields above."""
_WORD = re.compile(r"\w+")


# ---------------------------------------------------------------------------------- tasks


def load_tasks(
    source: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train", answered: bool = True
) -> list[Task]:
    """The tasks of a source, in its order; questions that it marks as unanswerable are left out.

    `source` is a file of JSON lines, a JSON list or Parquet, or a data set, of which `split` is taken where the
    source names none. `columns` says for our fields which of theirs hold them, a dot leading into a nested one.
    Without `answered`, plain records need neither question nor answers: their environment knows what is right.
    Raises InputError, naming where and the field, for a record that is no task, an id that comes twice, and a source
    without tasks.
    """
    return read_tasks(source, columns=columns, split=split, answered=answered).tasks


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """What a source of tasks holds."""

    tasks: list[Task]
    format: str
    """The question set's that its records are of, or `plain`."""
    skipped: int
    """Questions that the source itself marks as unanswerable."""
    faults: list[str]
    """What is wrong with records that are no tasks; empty unless they were asked for."""


def read_tasks(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    answered: bool = True,
    tolerant: bool = False,
) -> TaskSource:
    """As `load_tasks`, and what is left out; `tolerant` collects the faults of records instead of raising them."""
    seen: dict[str, str] = {}
    tasks: list[Task] = []
    faults: list[str] = []
    kind, numbered, skipped = None, False, 0
    for number, (where, record) in enumerate(read_rows(source, split), start=1):
        if number == 1:
            kind = None if columns else recognised(record)
            numbered = "id" not in record and "id" not in (columns or {})
        try:
            found = _tasks_of(record, kind, columns, where, answered=answered)
            for task in filter(None, found):
                tasks.append(_with_id(task, record, where, number if numbered else None, seen))
            skipped += found.count(None)
        except InputError as error:
            if not tolerant:
                raise
            faults.append(str(error))
    if not tasks and not faults:
        raise InputError(f"{source} must hold questions with answers; got none; check the file")
    return TaskSource(tasks=tasks, format=kind or PLAIN, skipped=skipped, faults=faults)


def _with_id(task: Task, record: Record, where: str, number: int | None, seen: dict[str, str]) -> Task:
    """The task, under its record's number where no record has an id of its own; its id is noted in `seen`."""
    if not task.id and number is None:
        raise field_error(where, "id", "a string that is not blank, as in the first record", record)
    named = task if task.id else dataclasses.replace(task, id=str(number))
    note_id(named.id, where, seen)
    return named


def _tasks_of(
    record: Record, kind: Any, columns: Mapping[str, str] | None, where: str, *, answered: bool
) -> list[Task | None]:
    """A record's tasks; None for a question that is marked as unanswerable. Without an id, a plain one's is blank."""
    if kind:
        return [task for task, _, _ in questions_of(record, kind, where)]
    record = _mapped(record, columns, where) if columns else record
    return [task_from_record(record, where, answered=answered)]


def parse_columns(text: str) -> dict[str, str]:
    """The mapping that `question=prompt,answers=gold` writes; ConfigError for any other text."""
    pairs = [part.partition("=") for part in str(text).split(",")]
    names = [ours.strip() for ours, _, _ in pairs]
    for (_, equals, theirs), ours in zip(pairs, names, strict=True):
        if not equals or not theirs.strip() or ours not in MAPPED or names.count(ours) > 1:
            raise ConfigError(
                f"columns must be pairs such as question=prompt,answers=gold of the fields {', '.join(MAPPED)}, each "
                f"once; got {text!r}; correct it"
            )
    return {ours: theirs.strip() for ours, (_, _, theirs) in zip(names, pairs, strict=True)}


def _mapped(record: Record, columns: Mapping[str, str], where: str) -> Record:
    """The record with its columns under our names, the other fields as they are."""
    ours = {name: _column(record, column, where) for name, column in columns.items()}
    taken = {column.split(".")[0] for column in columns.values()}
    return {**{name: value for name, value in record.items() if name not in taken}, **ours}


def _column(record: Record, column: str, where: str) -> Any:
    """The value of a column; a dot leads into a nested one where no column has that very name."""
    value: Any = record
    for name in [column] if column in record else column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise field_error(where, column, "a column of every record", record)
        value = value[name]
    return value


def task_from_record(record: Record, where: str, *, answered: bool = True) -> Task:
    """The task that a plain JSON object describes, with question and answers where it must be `answered`.

    `where` begins the text of an InputError. The id is blank where the record has no such field.
    """
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise field_error(where, "kind", "a string", record)
    return Task(
        id=id_field(record, where) if "id" in record else "",
        question=text_field(record, "question", where) if answered or "question" in record else "",
        answers=_answers(record, where) if answered or {"answer", "answers"} & record.keys() else (),
        kind=kind or "",
        metadata={name: value for name, value in record.items() if name not in _FIELDS},
    )


def _answers(record: Record, where: str) -> tuple[str, ...]:
    """The accepted answers; a whole number is its digits."""
    name = "answer" if "answer" in record and "answers" not in record else "answers"
    value = record.get(name)
    answers: list[Any] = [str(a) if type(a) is int else a for a in (value if isinstance(value, list) else [value])]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
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
    answered = answered_in(tasks, texts)
    if not answered:
        raise InputError(
            f"the corpus must hold an answer of at least one task; it holds none of {len(tasks)} "
            f"tasks, such as {tasks[0].answers[0]!r}; give the corpus that belongs to the questions"
        )
    return len(answered) / len(tasks)


def answered_in(tasks: Sequence[Task], texts: Iterable[str]) -> set[int]:
    """The tasks, by position, with an answer that some text holds as whole words, case ignored."""
    open_answers: Answers = {}
    answered: set[int] = set()
    for number, text in enumerate(texts):
        if number in (0, 1_000, 10_000, 100_000):  # leaves out what is answered by now
            open_answers = _answers_by_first_word(tasks, answered)
        answered |= _answered(_words(text), open_answers)
        if len(answered) == len(tasks):
            break
    return answered


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
