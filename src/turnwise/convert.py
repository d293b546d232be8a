"""From the public question sets to task files, and their passages to a corpus file.

The formats are those of `turnwise.question_sets`, the sources those of `turnwise.records`. SQuAD's, HotpotQA's, 2Wiki's
and MuSiQue's records hold passages.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turnwise.errors import InputError, RunError, unknown_name
from turnwise.question_sets import FORMATS, Format, Passage, Question, questions_of, recognised
from turnwise.records import note_id, read_rows, shown
from turnwise.tasks import task_line
from turnwise.types import Task


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` wrote."""

    format: Format
    tasks: int
    skipped: int
    """Questions that the file itself calls unanswerable; they have no answer to be rewarded."""
    articles: int
    tasks_path: Path
    corpus_path: Path | None
    """None where the file holds no passages."""


def convert(source: str | Path, out: str | Path, format: Format | Literal["auto"] = "auto") -> Converted:
    """Writes a question set's tasks to `out` and its passages, each once, to a corpus beside it.

    A task's metadata has under `articles` the ids, in that corpus, of the passages that hold its answer.
    `out` ends in `.jsonl` or `.jsonl.gz`; of `x.jsonl` the corpus is `x.corpus.jsonl.gz`. The same
    source gives the same bytes. Raises InputError where the source is not of the format or has a
    question without answers that is not marked as unanswerable, or would be overwritten, RunError where `out` cannot be
    written; each file appears complete or not at all.
    """
    out = Path(out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"the task file's name must end in .jsonl or .jsonl.gz; got {out.name!r}; rename it")
    if format != "auto" and format not in FORMATS:
        raise unknown_name("the format of a question set", format, ("auto", *FORMATS))
    kind, found = _questions(source, format)
    ids: dict[Passage, str] = {}
    for passage in (p for _, passages, _ in found for p in passages if p[1].strip()):
        ids.setdefault(passage, f"p{len(ids)}")
    tasks = [_with_articles(task, gold, ids) for task, _, gold in found if task]
    if not tasks:
        raise InputError(f"{source} must hold questions with answers; got none; check the file")
    corpus = out.with_name(f"{out.name.split('.jsonl')[0]}.corpus.jsonl.gz") if ids else None
    for path in filter(None, (out, corpus)):
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise InputError(f"what is written must not replace its source; got {path} for both; choose another name")
    if corpus:
        _write_lines(corpus, map(_article_line, ids.items()))
    _write_lines(out, map(task_line, tasks))
    return Converted(
        format=kind,
        tasks=len(tasks),
        skipped=sum(task is None for task, _, _ in found),
        articles=len(ids),
        tasks_path=out,
        corpus_path=corpus,
    )


def _questions(source: str | Path, format: Format | Literal["auto"]) -> tuple[Format, list[Question]]:
    """The format of a source, and its questions; those without an id of their own have their record's number."""
    kind: Format | None = None if format == "auto" else format
    found: list[Question] = []
    seen: dict[str, str] = {}
    for number, (where, record) in enumerate(read_rows(source), start=1):
        kind = kind or recognised(record)
        if kind is None:
            raise InputError(
                f"{source} must be of one of the formats {', '.join(FORMATS)}; got {shown(', '.join(record))}; fetch "
                "the question set's own file, or train on it as it is (turnwise train --tasks)"
            )
        for task, passages, gold in questions_of(record, kind, where):
            named = dataclasses.replace(task, id=str(number)) if task and not task.id else task
            if named:
                note_id(named.id, where, seen)
            found.append((named, passages, gold))
    assert kind is not None, "a source holds a record, or cannot be read"
    return kind, found


def _with_articles(task: Task, gold: list[Passage], ids: Mapping[Passage, str]) -> Task:
    """The task with the ids of its gold passages in the corpus, as `articles`, where all are there."""
    articles = list(dict.fromkeys(ids[passage] for passage in gold if passage in ids))
    if not articles or not all(passage in ids for passage in gold):
        return task
    return dataclasses.replace(task, metadata={**task.metadata, "articles": articles})


# ------------------------------------------------------------------------------------ writing


def _article_line(entry: tuple[Passage, str]) -> str:
    (title, text), name = entry
    return json.dumps({"id": name, "title": title, "text": text}, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, compressed where its name says so, complete or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else file
            with io.TextIOWrapper(packed, encoding="utf-8", errors="replace", newline="\n") as text:
                text.writelines(f"{line}\n" for line in lines)
        os.replace(draft, path)
    except OSError as error:
        raise RunError(
            f"{path} must be a file that can be written; got {error.strerror or error}; choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
