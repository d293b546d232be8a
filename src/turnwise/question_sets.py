"""The public question sets' records, recognised by their fields: a record to its questions.

Of each set the fields of its own files and of its data set on the Hugging Face hub are known: TriviaQA (Joshi et al.,
2017), SQuAD v1.1 and v2 (Rajpurkar et al., 2016, 2018), HotpotQA (Yang et al., 2018) and 2WikiMultihopQA (Ho et al.,
2020), which share one format, MuSiQue (Trivedi et al., 2022), PopQA (Mallen et al., 2023), Bamboogle (Press et al.,
2023), GSM8K (Cobbe et al., 2021), and the one layout that FlashRAG (Jin et al., 2024) gives to many sets.
NQ-open's records (Lee et al., 2019) are plain ones. Standard library only.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from turnwise.errors import InputError
from turnwise.records import Record, parsed, shown
from turnwise.types import Task

Format = Literal["triviaqa", "squad", "hotpotqa", "musique", "popqa", "bamboogle", "gsm8k", "flashrag"]
FORMATS: tuple[Format, ...] = get_args(Format)
Passage = tuple[str, str]
"""Title and text."""
Question = tuple[Task | None, list[Passage], list[Passage]]
"""A task, or None where the question is marked as unanswerable; the passages it came with; those of them
that hold its answer, for several hops in their order where the file tells it, and none where one is missing.
A task without an id of its own has a blank one."""
_FINAL = re.compile(r"(?s)(.*?)\s*####\s*(\S[^\n]*?)\s*$")
"""A worked solution of GSM8K and its last line, the answer."""
_UNKNOWN = "<unk>"
"""What TriviaQA's questions without a known answer hold on the hub."""


def recognised(record: Record) -> Format | None:
    """The format of a record by its fields; None for a plain one."""
    return next((kind for kind, holds in _SIGNS.items() if holds(record)), None)


def questions_of(record: Record, kind: Format, where: str) -> list[Question]:
    """The questions that a record of a format holds.

    Raises InputError, which begins with `where` and names the field, for a record that is not of the format or whose
    question has no answers and is not marked as unanswerable.
    """
    try:
        found = [*map(_of_texts, _READERS[kind](record))]
    except KeyError as error:
        name = error.args[0]
        hint = "take a train or dev file" if str(name).lower() in _ANSWER_FIELDS else "check the file"
        raise InputError(
            f"{where} must be a {kind} record; field {name!r} is missing among {shown(', '.join(record))}; {hint}"
        ) from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        came = " ".join(str(error).split())[:120]
        raise InputError(f"{where} must be a {kind} record; {came}; check the file, or name its columns") from error
    for task, _, _ in found:
        if task and not (task.answers and task.question.strip()):
            raise InputError(
                f"{where}: every question must have a text and an answer; {(task.id or task.question)!r} has not; "
                "take a file with answers (train or dev)"
            )
    return found


_ANSWER_FIELDS = ("answer", "answers", "value", "possible_answers", "golden_answers")


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


def _unique(answers: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))


# ------------------------------------------------------------------------------ the formats


def _triviaqa(record: Record) -> Iterator[Question]:
    named = _folded(record)
    answer = _folded(named["answer"])
    given = [answer["value"], *(answer.get("aliases") or ()), *(answer.get("humananswers") or ())]
    answers = _unique(text for text in given if text != _UNKNOWN)
    yield Task(id=named["questionid"], question=named["question"], answers=answers), [], []


def _folded(record: Mapping[str, Any]) -> Record:
    """Fields by names without capitals and underscores: the files write `HumanAnswers`, the hub `human_answers`."""
    return {name.replace("_", "").lower(): value for name, value in record.items()}


def _squad(record: Record) -> Iterator[Question]:
    title = (record.get("title") or "").replace("_", " ")
    if "paragraphs" not in record:  # a row of the hub: one question with its paragraph
        passages = [(title, record["context"])]
        answers = _unique(record["answers"]["text"])
        task = Task(id=record["id"], question=record["question"], answers=answers) if answers else None
        yield task, passages, passages
        return
    for paragraph in record["paragraphs"]:
        passages = [(title, paragraph["context"])]
        for question in paragraph["qas"]:
            yield (None if question.get("is_impossible") else _squad_task(question)), passages, passages


def _squad_task(question: Mapping[str, Any]) -> Task:
    answers = _unique(answer["text"] for answer in question["answers"])
    return Task(id=question["id"], question=question["question"], answers=answers)


def _hotpotqa(record: Record) -> Iterator[Question]:
    titles = list(dict.fromkeys(title for title, _ in _pairs(record.get("supporting_facts"), "sent_id")))
    metadata = {"level": record.get("level"), "supporting_titles": titles}
    task = Task(
        id=record["_id"] if "_id" in record else record["id"],
        question=record["question"],
        answers=_unique([record["answer"]]),
        kind=record.get("type", ""),
        metadata={name: value for name, value in metadata.items() if value},
    )
    context = _pairs(record.get("context"), "sentences", "content")
    passages = [(title, _joined(sentences)) for title, sentences in context]
    by_title = dict(passages)
    gold = [(title, by_title[title]) for title in titles if title in by_title]
    yield task, passages, gold if len(gold) == len(titles) else []


def _pairs(value: Any, *seconds: str) -> list[Any]:
    """Titles, each with what belongs to it: a list of pairs, two named lists as on the hub, or JSON text of either."""
    value = parsed(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        second = next((name for name in seconds if name in value), seconds[0])
        return [*zip(value["title"], value[second], strict=True)]
    return value or []


def _joined(sentences: list[str]) -> str:
    """Sentences as one text: HotpotQA's begin with a space where one is due, 2Wiki's do not."""
    return " ".join(" ".join(sentences).split())


def _musique(record: Record) -> Iterator[Question]:
    paragraphs = record.get("paragraphs") or ()
    gold = _in_hop_order([p for p in paragraphs if p.get("is_supporting")], record)
    titles = list(dict.fromkeys(p["title"] for p in gold))
    task = Task(
        id=record["id"],
        question=record["question"],
        answers=_unique([record["answer"], *record.get("answer_aliases", ())]),
        kind=record["id"].split("_")[0],
        metadata={"supporting_titles": titles} if titles else {},
    )
    yield (task if record.get("answerable", True) else None), [*map(_passage, paragraphs)], [*map(_passage, gold)]


def _passage(paragraph: Mapping[str, Any]) -> Passage:
    return paragraph["title"], paragraph["paragraph_text"]


def _in_hop_order(gold: list[Mapping[str, Any]], question: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Supporting paragraphs by the step of the question that each answers; the others last."""
    steps = [step.get("paragraph_support_idx") for step in question.get("question_decomposition") or ()]
    return sorted(gold, key=lambda p: steps.index(p["idx"]) if p.get("idx") in steps else len(steps))


def _popqa(record: Record) -> Iterator[Question]:
    answers = record["possible_answers"]
    answers = parsed(answers) if isinstance(answers, str) else answers
    kept = ("subj", "obj", "s_wiki_title", "o_wiki_title", "s_pop", "o_pop")
    task = Task(
        id=record["id"],
        question=record["question"],
        answers=_unique(answers),
        kind=record.get("prop") or "",
        metadata={name: record[name] for name in kept if name in record},
    )
    yield task, [], []


def _bamboogle(record: Record) -> Iterator[Question]:
    yield Task(id=record.get("id", ""), question=record["Question"], answers=_unique([record["Answer"]])), [], []


def _gsm8k(record: Record) -> Iterator[Question]:
    found = _FINAL.fullmatch(record["answer"])
    if not found:
        raise ValueError(f"field 'answer' must end in a line '#### NUMBER'; got {shown(record['answer'][-40:])}")
    task = Task(
        id=record.get("id", ""),
        question=record["question"],
        answers=_unique([found[2].replace(",", ""), found[2]]),
        metadata={"solution": found[1]},
    )
    yield task, [], []


def _flashrag(record: Record) -> Iterator[Question]:
    task = Task(
        id=record.get("id", ""),
        question=record["question"],
        answers=_unique(record["golden_answers"]),
        metadata=record.get("metadata") or {},
    )
    yield task, [], []


_READERS: Mapping[str, Callable[[Record], Iterator[Question]]] = {
    "triviaqa": _triviaqa,
    "squad": _squad,
    "hotpotqa": _hotpotqa,
    "musique": _musique,
    "popqa": _popqa,
    "bamboogle": _bamboogle,
    "gsm8k": _gsm8k,
    "flashrag": _flashrag,
}


def _first_paragraph_has(record: Record, name: str) -> bool:
    paragraphs = record.get("paragraphs")
    return (
        isinstance(paragraphs, list) and bool(paragraphs) and isinstance(paragraphs[0], dict) and name in paragraphs[0]
    )


def _is_squad(record: Record) -> bool:
    answers = record.get("answers")
    return _first_paragraph_has(record, "qas") or (isinstance(answers, dict) and "text" in answers)


def _is_triviaqa(record: Record) -> bool:
    answer = record.get("answer")
    return "QuestionId" in record or ("question_id" in record and isinstance(answer, dict))


def _is_gsm8k(record: Record) -> bool:
    answer = record.get("answer")
    return isinstance(answer, str) and _FINAL.fullmatch(answer) is not None


_SIGNS: Mapping[Format, Callable[[Record], bool]] = {
    "triviaqa": _is_triviaqa,
    "squad": _is_squad,
    "hotpotqa": lambda record: ("_id" in record or "supporting_facts" in record) and "answers" not in record,
    "musique": lambda record: _first_paragraph_has(record, "paragraph_text") or "question_decomposition" in record,
    "popqa": lambda record: "possible_answers" in record,
    "bamboogle": lambda record: "Question" in record and "Answer" in record,
    "gsm8k": _is_gsm8k,
    "flashrag": lambda record: "golden_answers" in record,
}
"""By what each is known, in the order in which they are tried."""
