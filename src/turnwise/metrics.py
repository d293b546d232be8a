"""Answer metrics: exact match, token F1 and presence, each equal to its official script.

The definitions differ in what is equalised before texts are compared:

* `paper` (the code of arXiv 2505.11821): lower case, outer white space removed;
* `squad` (the script of SQuAD v1.1): lower case, ASCII punctuation deleted, then a, an and the
  removed and white space collapsed;
* `triviaqa` (TriviaQA's script): the same, but punctuation, ‘ ’ ´ ` included, becomes a space.

So `U.S.` is `us` under `squad` and `u s` under `triviaqa`. Each metric is the best over the
accepted answers, which are taken as they come: to repeat the authors' numbers under `paper`, give
it the aliases that TriviaQA has normalised. Sources, each with its evaluation script: Rajpurkar et
al. (2016, 2018), Joshi et al. (2017), Yang et al. (2018).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from turnwise.errors import InputError, unknown_name

Definition = Literal["paper", "squad", "triviaqa"]
F1Definition = Literal["squad", "squad_v2", "triviaqa", "hotpotqa"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETED = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + "‘’´", " "))
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def exact_match(answer: str, golds: Sequence[str], definition: Definition = "squad") -> float:
    """1 where the answer equals one of the accepted answers after normalisation, else 0."""
    if definition not in NORMALISED:
        raise unknown_name("the definition of exact match", definition, NORMALISED)
    normalised = NORMALISED[definition]
    wanted = normalised(answer)
    return float(any(normalised(gold) == wanted for gold in _at_least_one(golds)))


def f1(answer: str, golds: Sequence[str], definition: F1Definition = "squad") -> float:
    """Best F1 of the bags of normalised words, in [0, 1].

        F1 = 2PR / (P + R),   P = common / words of the answer,   R = common / words of the gold

    Nothing in common gives 0, also where both sides are empty. `squad_v2` gives 1 there, and drops
    golds that are empty after normalisation unless all are (no golds: unanswerable). `hotpotqa`
    gives 0 where one side is yes, no or noanswer and the other is not the same.
    """
    if definition == "squad_v2":
        kept = [gold for gold in golds if squad_text(gold)] or [""]
        return max(_v2_f1(squad_text(answer), squad_text(gold)) for gold in kept)
    if definition == "hotpotqa":
        wanted = squad_text(answer)
        return max(_hotpot_f1(wanted, squad_text(gold)) for gold in _at_least_one(golds))
    if definition not in ("squad", "triviaqa"):
        known = ("squad", "squad_v2", "triviaqa", "hotpotqa")
        raise unknown_name("the definition of F1", definition, known)
    normalised = NORMALISED[definition]
    wanted = normalised(answer)
    return max(_bag_f1(wanted, normalised(gold)) for gold in _at_least_one(golds))


def answer_presence(text: str, golds: Sequence[str]) -> float:
    """1 where an accepted answer occurs in the text as a substring, both in lower case, else 0.

    As in the code of arXiv 2505.11821, except that a blank gold never counts.
    """
    lower = text.lower()
    return float(any(gold.strip() and gold.lower() in lower for gold in _at_least_one(golds)))


def pass_at(k: int, *, samples: int, correct: int) -> float:
    """The chance that one of k samples is correct, estimated without bias from at least as many.

        1 - C(n - c, k) / C(n, k),    c of n samples being correct

    Chen et al. 2021, arXiv 2107.03374, equation 1: the share of the subsets of k samples that hold a correct one.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise InputError(
            f"pass@k must have 1 <= k <= samples and 0 <= correct <= samples; got k {k}, samples {samples}, correct "
            f"{correct}; draw more samples, or take a smaller k"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def paper_text(text: str) -> str:
    """The text in lower case, without outer white space."""
    return text.lower().strip()


def squad_text(text: str) -> str:
    """The text as SQuAD's script compares it: `The AC/DC!` -> `acdc`."""
    return _without_articles(text.lower().translate(_DELETED))


def triviaqa_text(text: str) -> str:
    """The text as TriviaQA's script compares it: `The AC/DC!` -> `ac dc`."""
    return _without_articles(text.lower().translate(_SPACED))


NORMALISED: dict[str, Callable[[str], str]] = {
    "paper": paper_text,
    "squad": squad_text,
    "triviaqa": triviaqa_text,
}
"""The normalisation of each definition of exact match."""


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _bag_f1(answer: str, gold: str) -> float:
    answer_words, gold_words = answer.split(), gold.split()
    common = (Counter(answer_words) & Counter(gold_words)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(answer_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def _v2_f1(answer: str, gold: str) -> float:
    return _bag_f1(answer, gold) if answer and gold else float(answer == gold)


def _hotpot_f1(answer: str, gold: str) -> float:
    closed = answer in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS
    return 0.0 if closed and answer != gold else _bag_f1(answer, gold)


def _at_least_one(golds: Sequence[str]) -> Sequence[str]:
    if isinstance(golds, str) or not golds:
        raise InputError(
            f"golds must be a sequence of at least one accepted answer; got {golds!r}; give a tuple of strings"
        )
    return golds
