"""Each public question set's records, as its own files and as its data set on the hub write them."""

import json
from pathlib import Path

import pytest

from turnwise.errors import ConfigError, InputError
from turnwise.question_sets import FORMATS, recognised
from turnwise.tasks import PLAIN, load_tasks, parse_columns, read_tasks
from turnwise.types import Task

DATA = Path(__file__).parents[2] / "shared/data"

TRIVIA_OWN = {
    "Answer": {"Aliases": ["The Tapestry"], "HumanAnswers": ["The cloth"], "Value": "Bayeux Tapestry"},
    "EntityPages": [],
    "Question": "Which embroidery?",
    "QuestionId": "tc_1",
}
TRIVIA_HUB = {
    "question": "Which embroidery?",
    "question_id": "tc_1",
    "question_source": "http://example.org",
    "entity_pages": {"title": []},
    "answer": {"aliases": ["The Tapestry"], "normalized_aliases": ["tapestry"], "value": "Bayeux Tapestry"},
}
SQUAD_HUB = {
    "id": "5733",
    "title": "Nairobi_City",
    "context": "Nairobi is the capital.",
    "question": "Capital?",
    "answers": {"text": ["Nairobi", "Nairobi"], "answer_start": [0, 0]},
}
HOTPOT_HUB = {
    "id": "5a7a",
    "question": "Where was the maker of It born?",
    "answer": "Oslo",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": {"title": ["It", "Ada", "It"], "sent_id": [1, 0, 0]},
    "context": {"title": ["It", "Ada"], "sentences": [["It is a film."], ["Born in Oslo."]]},
}
WIKI_HUB = {  # the texts of nested fields are JSON
    "_id": "w1",
    "type": "compositional",
    "question": "Where was the maker of It born?",
    "context": json.dumps([["It", ["It is a film."]], ["Ada", ["Born in Oslo."]]]),
    "supporting_facts": json.dumps([["It", 0], ["Ada", 0]]),
    "evidences": "[]",
    "answer": "Oslo",
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "One.", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "Two.", "is_supporting": False},
    ],
    "question": "Which?",
    "question_decomposition": [{"id": 1, "question": "?", "answer": "One", "paragraph_support_idx": 0}],
    "answer": "One",
    "answer_aliases": ["1"],
    "answerable": True,
}
POPQA = {
    "id": 4222362,
    "subj": "George Rankin",
    "prop": "occupation",
    "obj": "politician",
    "subj_id": 1850297,
    "s_wiki_title": "George Rankin",
    "s_pop": 142,
    "question": "What is George Rankin's occupation?",
    "possible_answers": '["politician", "political leader", "pol"]',
}
BAMBOOGLE = {"Question": "Who was president when superconductivity was discovered?", "Answer": "Taft"}
GSM8K = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24.\nAltogether 48+24 = <<48+24=72>>72.\n#### 1,072",
}
FLASHRAG = {"id": "test_0", "question": "Who?", "golden_answers": ["Ada", "Lovelace"], "metadata": {"type": "x"}}
NQ_OPEN = {"question": "where did they film hot tub time machine", "answer": ["Fernie Alpine Resort"]}

READ = [
    ("triviaqa", TRIVIA_OWN, ("tc_1", ("Bayeux Tapestry", "The Tapestry", "The cloth"), "", {})),
    ("triviaqa", TRIVIA_HUB, ("tc_1", ("Bayeux Tapestry", "The Tapestry"), "", {})),
    ("squad", SQUAD_HUB, ("5733", ("Nairobi",), "", {})),
    ("hotpotqa", HOTPOT_HUB, ("5a7a", ("Oslo",), "bridge", {"level": "hard", "supporting_titles": ["It", "Ada"]})),
    ("hotpotqa", WIKI_HUB, ("w1", ("Oslo",), "compositional", {"supporting_titles": ["It", "Ada"]})),
    ("musique", MUSIQUE, ("2hop__1_2", ("One", "1"), "2hop", {"supporting_titles": ["A"]})),
    (
        "popqa",
        POPQA,
        (
            "4222362",
            ("politician", "political leader", "pol"),
            "occupation",
            {"subj": "George Rankin", "obj": "politician", "s_wiki_title": "George Rankin", "s_pop": 142},
        ),
    ),
    ("bamboogle", BAMBOOGLE, ("1", ("Taft",), "", {})),
    (
        "gsm8k",
        GSM8K,
        (
            "1",
            ("1072", "1,072"),
            "",
            {"solution": "In May she sold 48/2 = <<48/2=24>>24.\nAltogether 48+24 = <<48+24=72>>72."},
        ),
    ),
    ("flashrag", FLASHRAG, ("test_0", ("Ada", "Lovelace"), "", {"type": "x"})),
    (PLAIN, NQ_OPEN, ("1", ("Fernie Alpine Resort",), "", {})),
]


@pytest.mark.parametrize(("format", "record", "expected"), READ, ids=lambda value: value if type(value) is str else "")
def test_a_record_is_recognised_and_read(tmp_path: Path, format: str, record: dict, expected: tuple):
    assert (recognised(record) or PLAIN) == format
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = read_tasks(path)
    name, answers, kind, metadata = expected
    question = record.get("question") or record["Question"]
    task = Task(id=name, question=question, answers=answers, kind=kind, metadata=metadata)
    assert (found.tasks, found.format, found.skipped) == ([task], format, 0)


def test_every_format_has_a_test():
    assert {format for format, _, _ in READ} == {*FORMATS, PLAIN}


def test_questions_without_an_answer_are_left_out_where_marked_and_errors_where_not(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([SQUAD_HUB, {**SQUAD_HUB, "id": "2", "answers": {"text": [], "answer_start": []}}]))
    found = read_tasks(path)
    assert (len(found.tasks), found.skipped) == (1, 1)
    path.write_text(json.dumps([{**TRIVIA_HUB, "answer": {"value": "<unk>", "aliases": []}}]))
    with pytest.raises(InputError, match=r"t\.json: item 1: every question must have .* an answer; 'tc_1' has not"):
        load_tasks(path)


@pytest.mark.parametrize(
    ("good", "change", "expected"),
    [
        (
            MUSIQUE,
            {"paragraphs": [{"title": "A"}]},
            "item 2 must be a musique record; field 'paragraph_text' is missing",
        ),
        (POPQA, {"possible_answers": "politician"}, "item 2 must be a popqa record; Expecting value"),
        (GSM8K, {"answer": "72"}, "field 'answer' must end in a line '#### NUMBER'; got \"72\""),
        (HOTPOT_HUB, {"answer": None}, "item 2 must be a hotpotqa record; 'NoneType'"),
        (SQUAD_HUB, {"answers": ["x"]}, "item 2 must be a squad record"),
        (BAMBOOGLE, {"Answer": " "}, "item 2: every question must have a text and an answer"),
        (FLASHRAG, {"golden_answers": [1]}, "item 2 must be a flashrag record"),
    ],
)
def test_a_record_that_is_not_of_the_first_ones_format_is_named(tmp_path: Path, good, change, expected):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(InputError) as caught:
        load_tasks(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_missing_is_named_with_its_row_and_the_others(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([TRIVIA_OWN, {"QuestionId": "2", "Question": "?"}]))
    with pytest.raises(
        InputError, match=r"item 2 must be a triviaqa record; field 'answer' is missing .* train or dev"
    ):
        load_tasks(path)


# ---------------------------------------------------------------------------------- columns


def test_columns_of_other_names_stand_for_ours_and_the_rest_is_metadata(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": "2+2?", "gold": {"text": 4}, "n": i, "set": "sums"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = parse_columns("question=prompt, answers=gold.text,kind=set")
    assert load_tasks(path, columns=columns) == [
        Task(id="1", question="2+2?", answers=("4",), kind="sums", metadata={"n": 0}),
        Task(id="2", question="2+2?", answers=("4",), kind="sums", metadata={"n": 1}),
    ]
    with pytest.raises(InputError, match=r"t\.jsonl:1: field 'text' must be a column of every record; it is missing"):
        load_tasks(path, columns={"question": "text"})


def test_a_column_whose_own_name_has_a_dot_comes_before_a_nested_one(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"a.b": "one", "a": {"b": "two"}, "question": "?"}))
    assert load_tasks(path, columns={"answers": "a.b"})[0].answers == ("one",)


def test_columns_turn_the_recognition_off(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(POPQA))
    assert load_tasks(path, columns={"answers": "obj"})[0].answers == ("politician",)


@pytest.mark.parametrize("text", ["", "question", "question=", "text=a", "question=a,question=b"])
def test_a_text_that_is_no_mapping_is_refused(text: str):
    with pytest.raises(ConfigError, match="columns must be pairs such as question=prompt,answers=gold"):
        parse_columns(text)


# ------------------------------------------------------------------------------------- ids


def test_records_without_ids_are_numbered_and_an_id_that_only_some_have_is_an_error(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [NQ_OPEN, BAMBOOGLE | NQ_OPEN, NQ_OPEN]))
    assert [task.id for task in load_tasks(path)] == ["1", "2", "3"]
    path.write_text(json.dumps({**NQ_OPEN, "id": "a"}) + "\n" + json.dumps(NQ_OPEN))
    with pytest.raises(InputError, match=r"t\.jsonl:2: field 'id' must be a string that is not blank, as in the first"):
        load_tasks(path)


def test_faults_are_collected_where_that_is_asked_for(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    rows = [{**NQ_OPEN, "id": "a"}, {"id": "b", "question": "?"}, {**NQ_OPEN, "id": "a"}, {**NQ_OPEN, "id": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_tasks(path, tolerant=True)
    assert [task.id for task in found.tasks] == ["a", "c"]
    assert [fault.partition(": ")[0] for fault in found.faults] == [f"{path}:2", f"{path}:3"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("multihop/hotpotqa_100_questions.json", "hotpotqa", 100),
        ("multihop/musique_100_questions.json", "musique", 100),
        ("trivia/train.jsonl", PLAIN, 3970),
    ],
)
def test_the_real_files_are_tasks_as_they_are(name: str, format: str, count: int):
    found = read_tasks(DATA / name)
    assert (found.format, len(found.tasks), found.skipped) == (format, count, 0)
    if format in ("hotpotqa", "musique"):
        assert sum(len(task.metadata["supporting_titles"]) >= 2 for task in found.tasks) > 90
