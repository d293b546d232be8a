"""How often search finds the answer, and how fast: for several title boosts, or beside plain tantivy and bm25s.

    python benchmarks/search.py --data ../shared/data/trivia
    python benchmarks/search.py --atlas
    python benchmarks/search.py --data ../shared/data/trivia --others [--questions 1600]

The first needs a folder with `train.jsonl`, `validation.jsonl` and `wikipedia.jsonl.gz`: hit@k is
the share of questions, as they are, of which an answer stands in title or text of the first k
passages as whole words. The second asks the atlas by entity name and by raw question: hit@k is the
share for which the entity's own article is among the first k.

`--others` asks the same questions, one at a time, of four engines over the same passages, in turns of a hundred: ours
as the agent has it; tantivy as its own guide shows it, a title and a body that are stemmed, asked through its parser;
tantivy alone on our index, given the terms that ours finds in the question, so without reading it and without titles;
and bm25s with its stop words and a stemmer. Each gives five passages with their texts. Seconds are CPU time.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from measured import append

from turnwise.search import ArticleLike, Hit, SearchIndex, load_corpus, open_index
from turnwise.tasks import load_tasks

TITLE_BOOSTS = (0.0, 0.1, 0.25, 0.5, 1.0)
WORD = re.compile(r"\w+")
K = 5
Query = tuple[str, Callable[[Hit], bool]]
"""A query and whether a hit is what it was meant to find."""
Engine = Callable[[str], Sequence[Hit]]
"""The best `K` hits for a query."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the questions and passages")
    parser.add_argument("--atlas", action="store_true", help="measure on the embedded atlas")
    parser.add_argument("--cache", type=Path, help="folder for the index")
    parser.add_argument("--boost", type=float, help="this title boost alone")
    parser.add_argument("--others", action="store_true", help="compare with plain tantivy and bm25s, with --data")
    parser.add_argument("--questions", type=int, help="with --others: so many questions at most")
    parser.add_argument("--json", type=Path, help="with --others: file of JSON lines to add to")
    args = parser.parse_args()
    if args.others:
        if not args.data:
            parser.error("--others must have questions and passages; give --data FOLDER")
        compare(args)
        return
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


def compare(args: argparse.Namespace) -> None:
    """The same questions asked of three engines."""
    articles = list(load_corpus(args.data / "wikipedia.jsonl.gz"))
    index = open_index(args.data / "wikipedia.jsonl.gz", cache=args.cache)
    engines: dict[str, Engine] = {
        "turnwise": lambda query: index.search(query, K),
        "plain tantivy": plain_tantivy(articles),
        "bm25s": plain_bm25s(articles),
    }
    queries = [query for split in ("validation", "train") for query in trivia(args.data / f"{split}.jsonl")]
    queries = queries[: args.questions]
    terms = {query: index.query_terms(query) for query, _ in queries}
    engines["tantivy, terms given"] = bare_tantivy(index, terms)
    seconds = dict.fromkeys(engines, 0.0)
    ranks: dict[str, list[int]] = {name: [] for name in engines}
    for engine in engines.values():
        engine(queries[-1][0])
    for start in range(0, len(queries), 100):
        part = queries[start : start + 100]
        for name, engine in engines.items():
            began = time.process_time()
            found = [engine(query) for query, _ in part]
            seconds[name] += time.process_time() - began
            ranks[name] += [rank(hits, wanted) for hits, (_, wanted) in zip(found, part, strict=True)]
    print(f"{len(queries)} questions, {len(articles)} passages")
    for name, own in ranks.items():
        speed = len(queries) / seconds[name]
        values = {
            "questions": len(queries),
            "passages": len(articles),
            "queries_per_s": speed,
            "speed_ratio": speed * seconds["plain tantivy"] / len(queries),
            **{f"hit@{k}": sum(r < k for r in own) / len(own) for k in (1, 3, K)},
        }
        append(args.json, "search", {"engine": name}, values)
        rates = "  ".join(f"hit@{k} {values[f'hit@{k}']:.4f}" for k in (1, 3, K))
        print(f"{name:22} {rates}  {speed:7.0f} queries/s, {values['speed_ratio']:.2f} of plain tantivy's")


def rank(hits: Sequence[Hit], wanted: Callable[[Hit], bool]) -> int:
    """The place of the first hit that is wanted, from 0; `K` without one."""
    return next((place for place, hit in enumerate(hits) if wanted(hit)), K)


def plain_tantivy(articles: Sequence[ArticleLike]) -> Engine:
    """An index as tantivy's own guide makes one."""
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("title", stored=True, tokenizer_name="en_stem")
    builder.add_text_field("body", stored=True, tokenizer_name="en_stem")
    index = tantivy.Index(builder.build())
    writer = index.writer(100_000_000, 1)
    for article in articles:
        writer.add_document(tantivy.Document(title=article.title, body=article.text))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def search(query: str) -> list[Hit]:
        parsed, _ = index.parse_query_lenient(query, ["title", "body"])
        documents = [(score, searcher.doc(address)) for score, address in searcher.search(parsed, K).hits]
        return [
            Hit(id="", title=found.get_first("title") or "", text=found.get_first("body") or "", score=score)
            for score, found in documents
        ]

    return search


def bare_tantivy(index: SearchIndex, terms: Mapping[str, Sequence[str]]) -> Engine:
    """The searcher of our index, asked for any of a question's terms."""
    import tantivy

    schema, searcher = index._index.schema, index._searcher

    def search(query: str) -> list[Hit]:
        parts = [tantivy.Query.term_query(schema, "all", term, "freq") for term in terms[query]]
        either = tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts])
        found = [(score, searcher.doc(address)) for score, address in searcher.search(either, K, count=False).hits]
        return [
            Hit(
                id=document.get_first("id") or "",
                title=(document.get_first("title") or b"").decode(),
                text=(document.get_first("text") or b"").decode(),
                score=score,
            )
            for score, document in found
        ]

    return search


def plain_bm25s(articles: Sequence[ArticleLike]) -> Engine:
    """An index as bm25s's own guide makes one."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    options = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([f"{a.title} {a.text}" for a in articles], **options), show_progress=False)

    def search(query: str) -> list[Hit]:
        found, scores = retriever.retrieve(bm25s.tokenize([query], **options), k=K, show_progress=False)
        return [
            Hit(id=articles[i].id, title=articles[i].title, text=articles[i].text, score=float(score))
            for i, score in zip(found[0], scores[0], strict=True)
        ]

    return search


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
