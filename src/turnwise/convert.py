"""From the public question sets' own files to task files, and their passages to a corpus file.

Known formats: TriviaQA (Joshi et al., 2017), SQuAD v1.1 and v2 (Rajpurkar et al., 2016, 2018),
HotpotQA (Yang et al., 2018) and 2WikiMultihopQA (Ho et al., 2020), which share one, and MuSiQue
(Trivedi et al., 2022). All but TriviaQA's question files hold passages. Standard library only.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from turnwise.errors import InputError, RunError, unknown_name
from turnwise.tasks import read_lines, shown, task_line
from turnwise.types import Task

Format = Literal["triviaqa", "squad", "hotpotqa", "musique"]
FORMATS: tuple[Format, ...] = get_args(Format)
Passage = tuple[str, str]
"""Title and text."""


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
    source, out = Path(source), Path(out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"the task file's name must end in .jsonl or .jsonl.gz; got {out.name!r}; rename it")
    data = _load(source)
    kind = _recognised(data, source) if format == "auto" else format
    if kind not in _READERS:
        raise unknown_name("the format of a question set", kind, ("auto", *_READERS))
    try:
        found = [*map(_of_texts, _READERS[kind](data))]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(_not_of_format(source, kind, error)) from error
    ids: dict[Passage, str] = {}
    for passage in (p for _, passages, _ in found for p in passages if p[1].strip()):
        ids.setdefault(passage, f"p{len(ids)}")
    tasks = [_with_articles(task, gold, ids) for task, _, gold in found if task]
    _check_tasks(tasks, source)
    corpus = out.with_name(f"{out.name.split('.jsonl')[0]}.corpus.jsonl.gz") if ids else None
    for path in filter(None, (out, corpus)):
        if path.exists() and path.samefile(source):
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


# ------------------------------------------------------------------------------ the formats

Question = tuple[Task | None, list[Passage], list[Passage]]
"""A task, or None where the question is marked as unanswerable; the passages it came with; those of them
that hold its answer, for several hops in their order where the file tells it, and none where one is missing."""


def _of_texts(question: Question) -> Question:
    """The question, with a whole number as id made text. TypeError where anything else that must be text is not."""
    task, passages, gold = question
    if task and type(task.id) is int:
        task = dataclasses.replace(task, id=str(task.id))
    own = (task.id, task.question, task.kind) if task else ()
    for text in (*own, *(text for passage in passages for text in passage)):
        if not isinstance(text, str):
            raise TypeError(f"{shown(text)} stands where a text must")
    return task, passages, gold


def _triviaqa(data: Any) -> Iterator[Question]:
    for question in data["Data"]:
        answer = question["Answer"]
        given = [answer["Value"], *answer.get("Aliases", ()), *answer.get("HumanAnswers", ())]
        name, text = question["QuestionId"], question["Question"]
        yield Task(id=name, question=text, answers=_unique(given)), [], []


def _squad(data: Any) -> Iterator[Question]:
    for article in data["data"]:
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            passages = [(title, paragraph["context"])]
            for question in paragraph["qas"]:
                yield (None if question.get("is_impossible") else _squad_task(question)), passages, passages


def _squad_task(question: Mapping[str, Any]) -> Task:
    answers = _unique(answer["text"] for answer in question["answers"])
    return Task(id=question["id"], question=question["question"], answers=answers)


def _hotpotqa(data: Any) -> Iterator[Question]:
    for question in data:
        titles = list(dict.fromkeys(title for title, _ in question.get("supporting_facts", ())))
        metadata = {"level": question.get("level"), "supporting_titles": titles}
        task = Task(
            id=question["_id"],
            question=question["question"],
            answers=_unique([question["answer"]]),
            kind=question.get("type", ""),
            metadata={name: value for name, value in metadata.items() if value},
        )
        passages = [(title, _joined(sentences)) for title, sentences in question.get("context", ())]
        by_title = dict(passages)
        gold = [(title, by_title[title]) for title in titles if title in by_title]
        yield task, passages, gold if len(gold) == len(titles) else []


def _joined(sentences: list[str]) -> str:
    """Sentences as one text: HotpotQA's begin with a space where one is due, 2Wiki's do not."""
    return " ".join(" ".join(sentences).split())


def _musique(data: Any) -> Iterator[Question]:
    for question in data:
        paragraphs = question.get("paragraphs", ())
        gold = _in_hop_order([p for p in paragraphs if p.get("is_supporting")], question)
        titles = list(dict.fromkeys(p["title"] for p in gold))
        task = Task(
            id=question["id"],
            question=question["question"],
            answers=_unique([question["answer"], *question.get("answer_aliases", ())]),
            kind=question["id"].split("_")[0],
            metadata={"supporting_titles": titles} if titles else {},
        )
        yield (task if question.get("answerable", True) else None), [*map(_passage, paragraphs)], [*map(_passage, gold)]


def _passage(paragraph: Mapping[str, Any]) -> Passage:
    return paragraph["title"], paragraph["paragraph_text"]


def _in_hop_order(gold: list[Mapping[str, Any]], question: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Supporting paragraphs by the step of the question that each answers; the others last."""
    steps = [step.get("paragraph_support_idx") for step in question.get("question_decomposition", ())]
    return sorted(gold, key=lambda p: steps.index(p["idx"]) if p.get("idx") in steps else len(steps))


_READERS: dict[str, Callable[[Any], Iterable[Question]]] = {
    "triviaqa": _triviaqa,
    "squad": _squad,
    "hotpotqa": _hotpotqa,
    "musique": _musique,
}


def _recognised(data: Any, source: Path) -> Format:
    """The format by the names of the fields."""
    if isinstance(data, dict) and "Data" in data:
        return "triviaqa"
    if isinstance(data, dict) and "data" in data:
        return "squad"
    if isinstance(data, list) and data and isinstance(data[0], dict):
        if "_id" in data[0]:
            return "hotpotqa"
        if "paragraphs" in data[0]:
            return "musique"
    fields = list(data) if isinstance(data, dict) else data[:1] if isinstance(data, list) else data
    raise InputError(
        f"{source} must be of one of the formats {', '.join(FORMATS)}; got {shown(fields)}; "
        "fetch the question set's own file"
    )


def _with_articles(task: Task, gold: list[Passage], ids: Mapping[Passage, str]) -> Task:
    """The task with the ids of its gold passages in the corpus, as `articles`, where all are there."""
    articles = list(dict.fromkeys(ids[passage] for passage in gold if passage in ids))
    if not articles or not all(passage in ids for passage in gold):
        return task
    return dataclasses.replace(task, metadata={**task.metadata, "articles": articles})


def _unique(answers: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))


def _check_tasks(tasks: list[Task], source: Path) -> None:
    """InputError for a file without questions, a question without answers, an id given twice."""
    if not tasks:
        raise InputError(f"{source} must hold questions with answers; got none; check the file")
    seen: set[str] = set()
    for task in tasks:
        if not task.answers or not task.question.strip():
            raise InputError(
                f"{source}: every question must have a text and an answer; {task.id!r} has not; "
                "take a file with answers (train or dev)"
            )
        if task.id in seen:
            raise InputError(f"{source}: ids must be unique; got {task.id!r} twice; rename one")
        seen.add(task.id)


def _not_of_format(source: Path, kind: str, error: Exception) -> str:
    if isinstance(error, KeyError):
        came = f"a question lacks field {error.args[0]!r}"
        if error.args[0] in ("answer", "Answer", "answers"):
            return f"{source}: questions must have answers; {came}; take a train or dev file"
    else:
        came = " ".join(str(error).split())[:120]
    return f"{source} must be a {kind} file; {came}; check the file or name its format"


# ---------------------------------------------------------------------------- reading, writing


def _load(source: Path) -> Any:
    """The JSON value of a file, or the list of its lines' values; `.gz` included."""
    lines = [text for _, text in read_lines(source)]
    if not lines:
        raise InputError(f"{source} must hold JSON; it is empty; fetch it again")
    try:
        if source.name.removesuffix(".gz").endswith(".jsonl"):
            return [json.loads(line) for line in lines]
        return json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} must hold JSON; got {error}; fetch it again") from error


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
