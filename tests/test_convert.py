import gzip
import json
from pathlib import Path

import pytest

from turnwise.convert import convert
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.search import load_corpus
from turnwise.tasks import check_answers_in_corpus, load_tasks

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")

TRIVIA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["The Tapestry", "Bayeux Tapestry "],
                "HumanAnswers": ["Tapestry of Bayeux"],
                "NormalizedAliases": ["bayeux tapestry", "tapestry"],
                "NormalizedValue": "bayeux tapestry",
                "Type": "WikipediaEntity",
                "Value": "Bayeux Tapestry",
            },
            "EntityPages": [{"Filename": "x.txt", "Title": "X"}],
            "Question": "Which embroidery shows the Norman conquest?",
            "QuestionId": "tc_1",
            "QuestionSource": "http://example.org/",
        }
    ],
    "Domain": "Web",
    "VerifiedEval": False,
    "Version": 1.0,
}
PARAGRAPH = {
    "context": "Nairobi is the capital.",
    "qas": [
        {"id": "a", "question": "Capital?", "answers": [{"text": "Nairobi"}, {"text": "Nairobi"}]},
        {"id": "b", "question": "Moon?", "answers": [], "is_impossible": True},
    ],
}
SQUAD_2 = {"version": "v2.0", "data": [{"title": "Nairobi_City", "paragraphs": [PARAGRAPH]}]}
WIKI = {
    "_id": "w1",
    "type": "compositional",
    "question": "Where was the maker of It born?",
    "context": [["It", ["It is a film.", "Its maker is Ada."]], ["Ada", ["Born in Oslo."]]],
    "supporting_facts": [["It", 1], ["Ada", 0]],
    "evidences": [["It", "maker", "Ada"]],
    "answer": "Oslo",
}
HOP = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "One.", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "Two.", "is_supporting": False},
    ],
    "question": "Which?",
    "answer": "One",
    "answer_aliases": ["1"],
    "answerable": True,
}


def squad(context: object = "It is one.", **question: object) -> dict:
    asked = {"id": "s1", "question": "Which?", "answers": [{"text": "one"}], **question}
    return {"data": [{"title": "T", "paragraphs": [{"context": context, "qas": [asked]}]}]}


def source(folder: Path, data: object, name: str = "source.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_triviaqa_gives_value_aliases_and_human_answers_once_each(tmp_path):
    done = convert(source(tmp_path, TRIVIA), tmp_path / "t.jsonl")
    assert (done.format, done.tasks, done.articles) == ("triviaqa", 1, 0)
    assert done.corpus_path is None
    (task,) = load_tasks(tmp_path / "t.jsonl")
    assert task.id == "tc_1"
    assert task.question == "Which embroidery shows the Norman conquest?"
    assert task.answers == ("Bayeux Tapestry", "The Tapestry", "Tapestry of Bayeux")


def test_squad_2_leaves_unanswerable_questions_out_and_counts_them(tmp_path):
    done = convert(source(tmp_path, SQUAD_2), tmp_path / "t.jsonl")
    assert (done.format, done.tasks, done.skipped, done.articles) == ("squad", 1, 1, 1)
    (task,) = load_tasks(done.tasks_path)
    assert task.answers == ("Nairobi",)
    assert task.metadata == {"articles": ["p0"]}
    assert done.corpus_path is not None
    (article,) = load_corpus(done.corpus_path)
    assert (article.title, article.text) == ("Nairobi City", "Nairobi is the capital.")


def test_2wiki_is_read_as_hotpotqa(tmp_path):
    done = convert(source(tmp_path, [WIKI]), tmp_path / "t.jsonl")
    assert done.format == "hotpotqa"
    (task,) = load_tasks(done.tasks_path)
    assert (task.kind, task.answers) == ("compositional", ("Oslo",))
    assert task.metadata == {"supporting_titles": ["It", "Ada"], "articles": ["p0", "p1"]}
    assert done.corpus_path is not None
    texts = [article.text for article in load_corpus(done.corpus_path)]
    assert texts == ["It is a film. Its maker is Ada.", "Born in Oslo."]


def test_musique_is_read_from_json_lines_too(tmp_path):
    path = tmp_path / "musique.jsonl"
    unanswerable = {**HOP, "id": "3hop1__1_2_3", "answerable": False}
    path.write_text(f"{json.dumps(HOP)}\n{json.dumps(unanswerable)}\n")
    done = convert(path, tmp_path / "t.jsonl")
    assert (done.format, done.tasks, done.skipped, done.articles) == ("musique", 1, 1, 2)
    (task,) = load_tasks(done.tasks_path)
    assert (task.kind, task.answers) == ("2hop", ("One", "1"))
    assert task.metadata == {"supporting_titles": ["A"], "articles": ["p0"]}


def test_gold_passages_of_musique_stand_in_the_order_of_the_hops(tmp_path):
    # The first step is answered by paragraph 1, the second by paragraph 0.
    steps = [{"paragraph_support_idx": 1}, {"paragraph_support_idx": 0}]
    paragraphs = [{**p, "is_supporting": True} for p in HOP["paragraphs"]]
    done = convert(
        source(tmp_path, [{**HOP, "paragraphs": paragraphs, "question_decomposition": steps}]), tmp_path / "t.jsonl"
    )
    (task,) = load_tasks(done.tasks_path)
    assert task.metadata == {"supporting_titles": ["B", "A"], "articles": ["p1", "p0"]}


def test_a_passage_that_two_questions_share_has_one_id(tmp_path):
    other = {**WIKI, "_id": "w2", "context": [["New", ["A text."]], *WIKI["context"]]}
    done = convert(source(tmp_path, [WIKI, other]), tmp_path / "t.jsonl")
    assert [task.metadata["articles"] for task in load_tasks(done.tasks_path)] == [["p0", "p1"], ["p0", "p1"]]
    assert done.articles == 3


@pytest.mark.parametrize("context", [WIKI["context"][:1], [WIKI["context"][0], ["Ada", [" "]]]])
def test_a_question_whose_gold_passage_is_missing_names_no_articles(tmp_path, context):
    done = convert(source(tmp_path, [{**WIKI, "context": context, "answer": "film"}]), tmp_path / "t.jsonl")
    (task,) = load_tasks(done.tasks_path)
    assert task.metadata == {"supporting_titles": ["It", "Ada"]}


def test_the_same_source_gives_the_same_bytes_compressed_or_not(tmp_path):
    packed = tmp_path / "source.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(SQUAD_2).encode()))
    one = convert(source(tmp_path, SQUAD_2), tmp_path / "one.jsonl.gz")
    two = convert(packed, tmp_path / "sub/two.jsonl.gz")
    assert one.tasks_path.read_bytes() == two.tasks_path.read_bytes()
    assert one.corpus_path is not None
    assert one.corpus_path.name == "one.corpus.jsonl.gz"
    assert two.corpus_path is not None
    assert one.corpus_path.read_bytes() == two.corpus_path.read_bytes()


@pytest.mark.parametrize(
    ("data", "format", "expected"),
    [
        ({"questions": []}, "auto", "must be of one of the formats triviaqa, squad"),
        ([], "auto", "must hold a list of JSON objects; got []"),
        (3, "auto", "must hold a list of JSON objects; got 3"),
        ({"Data": []}, "auto", 'must hold a list of JSON objects; got {"Data": []}'),
        ({"Data": [{"QuestionId": "1", "Question": "?"}]}, "auto", "take a train or dev file"),
        ([{k: v for k, v in WIKI.items() if k != "answer"}], "auto", "take a train or dev file"),
        ([WIKI, WIKI], "auto", "source.json: item 2: field 'id' must be unique; got 'w1'"),
        (
            [{**WIKI, "answer": " "}],
            "auto",
            "item 1: every question must have a text and an answer; 'w1' has not",
        ),
        ([{**WIKI, "context": [["It"]]}], "auto", "item 1 must be a hotpotqa record"),
        ([WIKI], "squad", "must be a squad record"),
        (squad(context={"a": 1}), "auto", 'must be a squad record; {"a": 1} stands where a text must'),
        (squad(context=None), "auto", "must be a squad record; null stands where a text must"),
        (squad(id=["x"]), "auto", 'must be a squad record; ["x"] stands where a text must'),
        (squad(question=5), "auto", "must be a squad record; 5 stands where a text must"),
        ([{**WIKI, "type": {}}], "auto", "item 1 must be a hotpotqa record; {} stands where a text must"),
    ],
)
def test_a_source_that_does_not_fit_is_a_one_line_error_and_nothing_is_written(tmp_path, data, format, expected):
    path = source(tmp_path, data)
    with pytest.raises(InputError) as caught:
        convert(path, tmp_path / "t.jsonl", format)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_source_is_never_overwritten(tmp_path):
    same = source(tmp_path, HOP, "same.jsonl")
    with pytest.raises(InputError, match=r"must not replace its source; got .*same\.jsonl for both"):
        convert(same, same)
    packed = tmp_path / "x.corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(HOP).encode()))
    with pytest.raises(InputError, match=r"must not replace its source; got .*x\.corpus\.jsonl\.gz for both"):
        convert(packed, tmp_path / "x.jsonl")
    assert convert(packed, tmp_path / "y.jsonl").tasks == convert(same, tmp_path / "z.jsonl").tasks == 1


def test_an_id_that_is_a_whole_number_becomes_text(tmp_path):
    assert convert(source(tmp_path, squad(id=5)), tmp_path / "t.jsonl").tasks == 1
    assert [task.id for task in load_tasks(tmp_path / "t.jsonl")] == ["5"]


def test_files_and_names_that_cannot_be_used_are_named(tmp_path):
    path = source(tmp_path, TRIVIA)
    with pytest.raises(InputError, match="there is none"):
        convert(tmp_path / "nowhere.json", tmp_path / "t.jsonl")
    with pytest.raises(InputError, match=r"must end in \.jsonl"):
        convert(path, tmp_path / "t.json")
    with pytest.raises(ConfigError, match="did you mean triviaqa"):
        convert(path, tmp_path / "t.jsonl", "trivia")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError, match="must be a file that can be written"):
        convert(path, path / "t.jsonl")
    broken = tmp_path / "broken.json"
    broken.write_text('{"Data": [')
    with pytest.raises(InputError, match="must hold JSON; got"):
        convert(broken, tmp_path / "t.jsonl")


@needs_data
@pytest.mark.parametrize(
    ("name", "format", "tasks", "articles"),
    [
        ("squad/dev-v1.1.json", "squad", 10570, 2067),
        ("multihop/hotpotqa_100_questions.json", "hotpotqa", 100, 994),
        ("multihop/musique_100_questions.json", "musique", 100, 1890),
    ],
)
def test_the_real_files_convert_and_their_passages_hold_the_answers(tmp_path, name, format, tasks, articles):
    done = convert(DATA / name, tmp_path / "t.jsonl")
    assert (done.format, done.tasks, done.articles) == (format, tasks, articles)
    assert done.skipped == 0
    assert done.corpus_path is not None
    texts = [article.text for article in load_corpus(done.corpus_path)]
    share = check_answers_in_corpus(load_tasks(done.tasks_path), texts)
    assert share > 0.9 if format != "squad" else share > 0.99


@needs_data
@pytest.mark.parametrize("name", ["hotpotqa", "musique"])
def test_the_real_multi_hop_questions_name_gold_articles_with_the_supporting_titles(tmp_path, name):
    done = convert(DATA / f"multihop/{name}_100_questions.json", tmp_path / "t.jsonl")
    assert done.corpus_path is not None
    titles = {article.id: article.title for article in load_corpus(done.corpus_path)}
    for task in load_tasks(done.tasks_path):
        assert len(task.metadata["articles"]) >= 2
        assert list(dict.fromkeys(titles[a] for a in task.metadata["articles"])) == task.metadata["supporting_titles"]
