"""How often search finds the answer, and how fast, for several title boosts.

    python benchmarks/search.py --data ../shared/data/trivia
    python benchmarks/search.py --atlas

The first needs a folder with `train.jsonl`, `validation.jsonl` and `wikipedia.jsonl.gz`: hit@k is
the share of questions, as they are, of which an answer stands in title or text of the first k
passages as whole words. The second asks the atlas by entity name and by raw question: hit@k is the
share for which the entity's own article is among the first k.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from turnwise.search import Hit, SearchIndex, load_corpus, open_index
from turnwise.tasks import load_tasks

TITLE_BOOSTS = (0.0, 0.1, 0.25, 0.5, 1.0)
WORD = re.compile(r"\w+")
Query = tuple[str, Callable[[Hit], bool]]
"""A query and whether a hit is what it was meant to find."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the questions and passages")
    parser.add_argument("--atlas", action="store_true", help="measure on the embedded atlas")
    parser.add_argument("--cache", type=Path, help="folder for the index")
    parser.add_argument("--boost", type=float, help="this title boost alone")
    args = parser.parse_args()
    boosts = [args.boost] if args.boost is not None else TITLE_BOOSTS
    print(f"{'queries':32} {'title boost':>11} {'hit@1':>7} {'hit@5':>7} {'queries/s':>10}")
    for boost in boosts:
        if args.data:
            corpus = args.data / "wikipedia.jsonl.gz"
            index = open_index(corpus, cache=args.cache, title_boost=boost)
            for split in ("validation", "train"):
                report(f"TriviaQA {split}", boost, index, trivia(args.data / f"{split}.jsonl"))
        if args.atlas:
            index = SearchIndex(load_corpus("atlas"), title_boost=boost)
            report("atlas entity names", boost, index, entity_names())
            report("atlas single-hop questions", boost, index, atlas_questions())


def report(name: str, boost: float, index: SearchIndex, queries: Iterable[Query]) -> None:
    """Prints one line of the table."""
    firsts = fives = count = 0
    elapsed = 0.0
    for query, is_wanted in queries:
        start = time.perf_counter()
        hits = index.search(query, 5)
        elapsed += time.perf_counter() - start
        found = [is_wanted(hit) for hit in hits]
        count, firsts, fives = count + 1, firsts + any(found[:1]), fives + any(found)
    rates = f"{100 * firsts / count:7.2f} {100 * fives / count:7.2f} {count / elapsed:10.0f}"
    print(f"{name:32} {boost:11} {rates}", flush=True)


def trivia(path: Path) -> Iterable[Query]:
    """The questions as they are, each of which wants a passage with an answer."""
    for task in load_tasks(path):
        answers = [words for words in map(plain, task.answers) if words.strip()]
        yield task.question, answers_in(answers)


def answers_in(answers: list[str]) -> Callable[[Hit], bool]:
    return lambda hit: any(answer in plain(f"{hit.title} {hit.text}") for answer in answers)


def plain(text: str) -> str:
    """The words of a text in lower case, with a space around each."""
    return " ".join(["", *WORD.findall(text.lower()), ""])


def entity_names() -> Iterable[Query]:
    """Every title of the atlas, which wants the article of that title."""
    for article in load_corpus("atlas"):
        yield article.title, article_is(article.title)


def atlas_questions() -> Iterable[Query]:
    """Every question about one entity, in each phrasing, which wants that entity's article."""
    from turnwise.atlas import entities, kinds

    for entity in entities().values():
        for relation in entity.values:
            for question in kinds()[entity.kind].relations[relation].questions:
                yield question.format(name=entity.name), article_is(entity.name)


def article_is(title: str) -> Callable[[Hit], bool]:
    return lambda hit: hit.title == title


if __name__ == "__main__":
    main()
