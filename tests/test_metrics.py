"""Answer metrics against worked examples, real aliases, and the official scripts' algorithms."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.errors import ConfigError, InputError
from turnwise.metrics import answer_presence, exact_match, f1, squad_text, triviaqa_text

TRIVIA = Path(__file__).parents[2] / "shared/data/trivia/validation.jsonl"
SQUAD = Path(__file__).parents[2] / "shared/data/squad/dev-v1.1.json"

# ------------------------------------------------- the official algorithms, word by word
# Written from the scripts' behaviour: a mark is any of ASCII's 32 punctuation characters; an
# article is a maximal run of word characters (Unicode) that is exactly a, an or the, found after
# the marks are gone; words are what white space (Unicode) separates.

ASCII_MARKS = {chr(n) for n in range(33, 127) if not chr(n).isalnum()}


def reference_words(text: str, marks: set[str], instead: str) -> list[str]:
    bare = ""
    for character in text.lower():
        bare += instead if character in marks else character
    runs = re.split(r"(\w+)", bare)
    return "".join(" " if run in {"a", "an", "the"} else run for run in runs).split()


def reference_squad(text: str) -> list[str]:
    return reference_words(text, ASCII_MARKS, "")


def reference_triviaqa(text: str) -> list[str]:
    return reference_words(text.replace("_", " "), ASCII_MARKS | set("‘’´`"), " ")


def reference_bag_f1(answer: list[str], gold: list[str]) -> float:
    rest, same = list(gold), 0
    for word in answer:
        if word in rest:
            rest.remove(word)
            same += 1
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(answer), 1.0 * same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def reference_v2_f1(answer: str, golds: Sequence[str]) -> float:
    said = reference_squad(answer)
    scores = []
    for gold in [g for g in golds if reference_squad(g)] or [""]:
        wanted = reference_squad(gold)
        both = len(said) > 0 and len(wanted) > 0
        scores.append(reference_bag_f1(said, wanted) if both else int(said == wanted))
    return max(scores)


def reference_hotpotqa_f1(answer: str, gold: str) -> float:
    said, wanted = " ".join(reference_squad(answer)), " ".join(reference_squad(gold))
    for text in (said, wanted):
        if text in ["yes", "no", "noanswer"] and said != wanted:
            return 0
    return reference_bag_f1(said.split(), wanted.split())


PIECES = st.sampled_from(
    [
        *("a", "an", "the", "The", "A", "U.S.", "AC/DC", "O'Brien", "O’Brien", "yes", "no", "No."),
        *("noanswer", "Noanswer!", "_", "´", "`", "‘", "-", "—", ".", "é", "İ", "ß", "ſ", "Σ", "ς"),
        *(
            " ",
            "\u00a0",
            "\u2003",
            "\u2028",
            "\u200b",
            "\x1c",
            "\n",
            "\t",
            "·",
            "ª",
            "\u0301",
            "中",
        ),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=8).map("".join),
    st.lists(PIECES, max_size=8).map(" ".join),
    st.text(max_size=20),
)
GOLDS = st.lists(TEXTS, min_size=1, max_size=3)


@settings(deadline=None, max_examples=400)
@given(TEXTS, GOLDS)
def test_squad_scores_equal_the_official_algorithm(answer: str, golds: list[str]):
    wanted = [reference_squad(gold) for gold in golds]
    assert exact_match(answer, golds) == float(reference_squad(answer) in wanted)
    assert f1(answer, golds) == max(reference_bag_f1(reference_squad(answer), g) for g in wanted)


@settings(deadline=None, max_examples=400)
@given(TEXTS, GOLDS)
def test_triviaqa_scores_equal_the_official_algorithm(answer: str, golds: list[str]):
    wanted = [reference_triviaqa(gold) for gold in golds]
    said = reference_triviaqa(answer)
    assert exact_match(answer, golds, "triviaqa") == float(said in wanted)
    assert f1(answer, golds, "triviaqa") == max(reference_bag_f1(said, g) for g in wanted)


@settings(deadline=None, max_examples=400)
@given(TEXTS, GOLDS)
def test_squad_v2_and_hotpotqa_f1_equal_the_official_algorithms(answer: str, golds: list[str]):
    assert f1(answer, golds, "squad_v2") == reference_v2_f1(answer, golds)
    best = max(reference_hotpotqa_f1(answer, gold) for gold in golds)
    assert f1(answer, golds, "hotpotqa") == best


@settings(deadline=None, max_examples=400)
@given(TEXTS, GOLDS)
def test_the_papers_scores_compare_lower_case_text_and_nothing_else(answer: str, golds: list[str]):
    said = answer.lower()
    same = [gold for gold in golds if gold.lower().strip() == said.strip()]
    inside = [gold for gold in golds if gold.strip() != "" and gold.lower() in said]
    assert exact_match(answer, golds, "paper") == float(len(same) > 0)
    assert answer_presence(answer, golds) == float(len(inside) > 0)


# ------------------------------------------------------------------------ worked examples


@pytest.mark.parametrize(
    ("text", "squad", "triviaqa"),
    [
        ("U.S.", "us", "u s"),
        ("AC/DC", "acdc", "ac dc"),
        ("O'Brien", "obrien", "o brien"),
        ("O’Brien", "o’brien", "o brien"),  # only TriviaQA's script knows typographic quotes
        ("The A Team", "team", "team"),
        ("A.", "", ""),  # punctuation goes first, so that the letter becomes an article
        ("T.H.E. end", "end", "t h e end"),
        ("snake_case", "snakecase", "snake case"),
        ("naïve — the\u00a0café", "naïve — café", "naïve — café"),
        ("", "", ""),
    ],
)
def test_punctuation_is_deleted_by_squad_and_spaced_by_triviaqa(text, squad, triviaqa):
    assert squad_text(text) == squad
    assert triviaqa_text(text) == triviaqa


def test_exact_match_takes_the_best_gold_under_each_definition():
    golds = ("Abba", "beatles")
    assert exact_match("The Beatles.", golds, "squad") == 1.0
    assert exact_match("The Beatles.", golds, "triviaqa") == 1.0
    assert exact_match("The Beatles.", golds, "paper") == 0.0  # article and full stop are kept
    assert exact_match(" BEATLES\n", golds, "paper") == 1.0
    assert exact_match("Beatles band", golds) == 0.0


def test_f1_counts_each_common_word_as_often_as_both_sides_have_it():
    # "new york new" and "new york city": common new + york = 2; P = 2/3, R = 2/3; F1 = 2/3
    assert f1("New York, new", ["New York City"]) == pytest.approx(2 / 3)
    # "nairobi" against "nairobi" and against "city nairobi": best 1
    assert f1("Nairobi", ["the city Nairobi", "Nairobi"]) == 1.0
    # P = 1/1, R = 1/2: F1 = 2 · ½ / (3/2) = 2/3
    assert f1("Nairobi", ["the city Nairobi"]) == pytest.approx(2 / 3)
    assert f1("Mombasa", ["Nairobi"]) == 0.0


def test_two_texts_without_words_agree_only_under_squad_v2():
    assert f1("the", [""]) == f1("", ["."], "triviaqa") == f1("", ["an"], "hotpotqa") == 0.0
    assert f1("the", [""], "squad_v2") == 1.0
    assert f1("", [], "squad_v2") == 1.0  # unanswerable, and not answered
    assert f1("Paris", [], "squad_v2") == 0.0
    assert f1("", ["the", "Paris"], "squad_v2") == 0.0  # the blank gold is dropped beside a real one


def test_hotpotqa_f1_gives_nothing_for_a_closed_answer_in_other_words():
    assert f1("yes", ["Yes!"], "hotpotqa") == 1.0
    assert f1("yes it is", ["yes"], "hotpotqa") == 0.0
    assert f1("no", ["no way"], "hotpotqa") == 0.0
    assert f1("noanswer", ["noanswer here"], "hotpotqa") == 0.0
    assert f1("yes it is", ["yes"], "squad") == pytest.approx(0.5)  # P = 1/3, R = 1: F1 = 1/2


def test_a_blank_gold_occurs_nowhere():
    assert answer_presence("anything", ["", "  "]) == 0.0
    assert answer_presence("In NAIROBI, Kenya", ["", "Nairobi"]) == 1.0


@pytest.mark.parametrize("metric", [exact_match, f1, answer_presence])
@pytest.mark.parametrize("golds", [(), "Paris"])
def test_no_gold_or_one_bare_string_is_refused(metric: Callable, golds):
    with pytest.raises(InputError, match="golds must be a sequence of at least one"):
        metric("Paris", golds)


def test_an_unknown_definition_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean triviaqa"):
        exact_match("x", ["x"], "trivia")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="hotpotqa"):
        f1("x", ["x"], "hotpot")  # pyright: ignore[reportArgumentType]


# -------------------------------------------------------------------------------- real data


REFERENCES: tuple[tuple[Literal["squad", "triviaqa"], Callable[[str], list[str]]], ...] = (
    ("squad", reference_squad),
    ("triviaqa", reference_triviaqa),
)


@pytest.mark.skipif(not TRIVIA.exists(), reason="needs the shared TriviaQA questions")
def test_two_hundred_real_triviaqa_questions_score_as_the_official_algorithm_does():
    with TRIVIA.open(encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in islice(lines, 200)]
    assert len(tasks) == 200
    matches = {"squad": 0.0, "triviaqa": 0.0}
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        golds = task["answers"]
        for said in (
            golds[-1],
            f"The {golds[0]}.",
            golds[0].replace(" ", "-"),
            other["answers"][0],
        ):
            for definition, words in REFERENCES:
                wanted = [words(gold) for gold in golds]
                match = exact_match(said, golds, definition)
                assert match == float(words(said) in wanted)
                best = max(reference_bag_f1(words(said), gold) for gold in wanted)
                assert f1(said, golds, definition) == best
                matches[definition] += match
        assert exact_match(golds[-1], golds, "paper") == 1.0
    # With hyphens for spaces, an answer is the same words to TriviaQA's script, not to SQuAD's.
    assert matches["triviaqa"] > matches["squad"] >= 400


@pytest.mark.skipif(not SQUAD.exists(), reason="needs the shared SQuAD development set")
def test_one_human_answer_against_the_others_scores_as_the_official_algorithm_does():
    articles = json.loads(SQUAD.read_text(encoding="utf-8"))["data"]
    questions = [q for a in articles[:3] for p in a["paragraphs"] for q in p["qas"]]
    golds = [[g["text"] for g in q["answers"]] for q in questions]
    pairs = [(first, rest) for first, *rest in golds if rest]
    assert len(pairs) > 500
    for said, rest in pairs:
        wanted = [reference_squad(gold) for gold in rest]
        assert exact_match(said, rest) == float(reference_squad(said) in wanted)
        assert f1(said, rest) == max(reference_bag_f1(reference_squad(said), g) for g in wanted)
        assert f1(said, rest, "squad_v2") == reference_v2_f1(said, rest)
