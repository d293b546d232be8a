"""BM25 search over articles, on tantivy: in memory, or in a folder that is built once and reused.

Terms are lower-cased, freed of accents and stemmed as English. An article is found by title and
text together; where its whole title stands in the query, the title's rareness is added with weight
`title_boost`. A query is a plain question or a few words: stop and question words leave it unless
nothing else is in it, and every other word may match (never a query language, in which a question
mark or a colon would be an error).
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tantivy

from turnwise.errors import ConfigError, InputError, RunError, TurnwiseError
from turnwise.records import parsed
from turnwise.search.corpus import ATLAS, ArticleLike, corpus_files, load_corpus

FORMAT = 1
"""Version of the index's files; an index of another version is built anew."""
TITLE_BOOST = 0.25
"""Weight of the BM25 score of a whole title as one term; `benchmarks/search.py` measures it."""
MANIFEST = "turnwise.json"

_ANALYSER = "turnwise"
_MAX_TERMS = 64
_MAX_TITLE_WORDS = 8
_MAX_TIED = 256
_HEAP_BYTES = 64_000_000
_QUERIES_KEPT = 20_000
_ENDS_BYTES = 8_000_000
_STOP_WORDS: str = """
a an the and or but if so as of at by for with about against between into through during before
after above below to from up down in out on off over under again further then once here there all
any both each few more most other some such no nor not only own same than too very can will just
should would could shall may might must now until while because i me my we us our you your he him
his she her it its they them their this that these those am is are was were be been being have has
had having do does did doing who whom whose what which when where why how name named called
"""
"""Words that a query can do without, question words last."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One article that a search found; `score` is its BM25 score."""

    id: str
    title: str
    text: str
    score: float


class SearchIndex:
    """Searchable articles: `SearchIndex(articles)` in memory, `build` and `open` in a folder."""

    def __init__(self, articles: Iterable[ArticleLike], *, title_boost: float = TITLE_BOOST) -> None:
        self._use(tantivy.Index(_schema()), title_boost)
        self._insert(articles)

    @classmethod
    def build(
        cls,
        articles: Iterable[ArticleLike],
        folder: str | Path,
        *,
        title_boost: float = TITLE_BOOST,
        fingerprint: str | None = None,
    ) -> Self:
        """A new index in `folder`, which appears there complete or not at all.

        An index that is there already is replaced. Raises RunError where the folder holds anything
        else or cannot be written, InputError where there are no articles or an id comes twice.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise RunError(
                f"{folder} must be free or hold a search index; it holds something else; give another folder"
            )
        with _index_errors(f"{folder} must be a folder that can be written", "choose another"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with _index_errors(f"{folder} must have room for the index", "choose another folder"):
                self = cls.__new__(cls)
                self._use(tantivy.Index(_schema(), str(draft)), title_boost)
                self._insert(articles)
                _write_manifest(draft, fingerprint)
                _replace_folder(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls.open(folder, title_boost=title_boost)

    @classmethod
    def open(cls, folder: str | Path, *, title_boost: float = TITLE_BOOST) -> Self:
        """The index that `build` wrote into `folder`; RunError where it is missing or damaged."""
        folder = Path(folder)
        _check_files(folder, _read_manifest(folder))
        self = cls.__new__(cls)
        with _index_errors(f"{folder} must be a whole search index", "build it again"):
            self._use(tantivy.Index.open(str(folder)), title_boost, folder)
        return self

    def __len__(self) -> int:
        return self._searcher.num_docs

    def add(self, articles: Iterable[ArticleLike]) -> None:
        """Adds articles, all or none; an index in a folder keeps them.

        Raises InputError where an id is there already, RunError where the folder cannot be written
        or belongs to the cache, whose indexes hold what their corpus holds.
        """
        if self._cached_corpus:
            raise RunError(
                f"an index of the cache must hold its corpus and nothing else; got articles to add "
                f"to {self._folder}; add them to the corpus, or to an index from SearchIndex.build"
            )
        with _index_errors(f"{self._folder or 'the index'} must be writable", "check the disk"):
            self._insert(articles)
            if self._folder is not None:
                _write_manifest(self._folder, None)

    def search(self, query: str, k: int = 1) -> list[Hit]:
        """The `k` best articles for a question or a few words, best first; fewer where few match.

        Scores equal to four decimals stand in order of id. A query without any word finds nothing.
        """
        if k < 1:
            raise ConfigError(f"k must be >= 1; got {k}; give the number of hits wanted")
        return list(self._remembered(query, k))

    def query_terms(self, query: str) -> list[str]:
        """The different stemmed words that a query is matched by, at most 64 of them."""
        query = _encodable(query)
        terms = _query_analyser().analyze(query) or _analyser().analyze(query)
        return list(dict.fromkeys(terms))[:_MAX_TERMS]

    def _use(self, index: tantivy.Index, title_boost: float, folder: Path | None = None) -> None:
        if not title_boost >= 0:
            raise ConfigError(f"title_boost must be >= 0; got {title_boost}; 0 leaves titles alone")
        index.register_tokenizer(_ANALYSER, _analyser())
        index.config_reader("manual")  # no thread that watches the folder for changes of others
        self._index = index
        self._title_boost = title_boost
        self._folder = folder
        self._cached_corpus = False
        self._refresh()

    def _refresh(self) -> None:
        self._index.reload()
        self._searcher = self._index.searcher()
        self._remembered = functools.lru_cache(_QUERIES_KEPT)(self._search)

    def _insert(self, articles: Iterable[ArticleLike]) -> None:
        writer = self._index.writer(_HEAP_BYTES, 1)
        try:
            for article in self._new(articles):
                writer.add_document(_document(article))
            writer.commit()
        finally:
            writer.wait_merging_threads()  # gives the lock back; what is not committed is dropped
        self._refresh()
        if not len(self):
            raise InputError("a search index must have articles; got none; give a corpus with some")

    def _new(self, articles: Iterable[ArticleLike]) -> Iterator[ArticleLike]:
        """The articles as they come; InputError at an id that came before or is in the index."""
        seen: set[str] = set()
        for article in articles:
            if article.id in seen or self._searcher.doc_freq("id", _encodable(article.id)):
                raise InputError(f"an article's id must be unique in the index; got {article.id!r} twice; rename one")
            seen.add(article.id)
            yield article

    def _search(self, query: str, k: int) -> tuple[Hit, ...]:
        terms = self.query_terms(query)
        if not terms:
            return ()
        parts = [tantivy.Query.term_query(self._index.schema, "all", t, "freq") for t in terms]
        parts += self._title_parts(query, terms)
        either = tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts])
        with _index_errors(f"{self._folder or 'the index'} must be a whole index", "build it again"):
            found = self._best(either, k)
            hits = [_hit(self._searcher.doc(address), score) for score, address in found]
        return tuple(sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k])

    def _title_parts(self, query: str, terms: list[str]) -> list[tantivy.Query]:
        """A query part for each title that stands in the query and in no longer such title.

        A title of one word that is a stop word counts only where the query is nothing else.
        """
        if not self._title_boost:
            return []
        words = _analyser().analyze(_encodable(query))[:_MAX_TERMS]
        starts, lengths = range(len(words)), range(1, _MAX_TITLE_WORDS + 1)
        spans = (words[start : start + length] for start in starts for length in lengths)
        names = {" ".join(span) for span in spans if len(span) > 1 or span[0] in terms}
        titles = [name for name in sorted(names) if self._searcher.doc_freq("name", name)]
        return [
            tantivy.Query.boost_query(
                tantivy.Query.term_query(self._index.schema, "name", title, "basic"),
                self._title_boost,
            )
            for title in titles
            if not any(title != other and f" {title} " in f" {other} " for other in titles)
        ]

    def _best(self, query: tantivy.Query, k: int) -> list[tuple[float, tantivy.DocAddress]]:
        """The `k` best documents and those that tie with the last of them (up to a limit)."""
        limit = k + 1
        while True:
            hits = self._searcher.search(query, limit, count=False).hits
            scored = [(round(score, 4), address) for score, address in hits]
            last = scored[min(k, len(scored)) - 1][0] if scored else 0.0
            if len(scored) < limit or scored[-1][0] < last or limit >= k + _MAX_TIED:
                return [(score, address) for score, address in scored if score >= last]
            limit = min(2 * limit, k + _MAX_TIED)


# ----------------------------------------------------------------------- the corpus's index


def open_index(spec: str | Path, *, cache: str | Path | None = None, title_boost: float = TITLE_BOOST) -> SearchIndex:
    """The index of a corpus (see `load_corpus`): the atlas's in memory, others from a cache folder.

    `cache` is by default `turnwise` in the user's cache folder. An index there is reused as long as
    path, size and modification time of every file of the corpus stay the same; otherwise, and where
    the index is damaged (with a notice in the log), it is built anew.
    """
    if str(spec) == ATLAS:
        return SearchIndex(load_corpus(spec), title_boost=title_boost)
    corpus = Path(spec)
    fingerprint = _fingerprint(corpus_files(corpus))
    place = hashlib.blake2b(str(corpus.resolve()).encode(), digest_size=6).hexdigest()
    folder = Path(cache or default_cache()) / f"{corpus.name.split('.')[0] or 'corpus'}-{place}"
    index = _reusable(folder, fingerprint, title_boost)
    if index is None:
        articles = load_corpus(spec)
        index = SearchIndex.build(articles, folder, title_boost=title_boost, fingerprint=fingerprint)
    index._cached_corpus = True
    return index


def default_cache() -> Path:
    """The folder `turnwise` in the user's cache folder (XDG_CACHE_HOME, or else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnwise"


def _reusable(folder: Path, fingerprint: str, title_boost: float) -> SearchIndex | None:
    """The index in `folder` if it is whole and of that corpus; what is damaged is taken away."""
    if not folder.exists():
        return None
    try:
        manifest = _read_manifest(folder)
        if manifest["fingerprint"] == fingerprint and manifest["format"] == FORMAT:
            return SearchIndex.open(folder, title_boost=title_boost)
    except RunError as error:
        logger.warning("building the search index anew: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _fingerprint(files: list[Path]) -> str:
    """A digest of path, size in bytes and modification time in ns of every file."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


# -------------------------------------------------------------------------- the index's files


def _write_manifest(folder: Path, fingerprint: str | None) -> None:
    """Notes what the index was made of and the checksums of the files that never change."""
    segments = sorted(file for file in folder.iterdir() if _is_segment(file))
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "files": {file.name: _checksum(file) for file in segments},
    }
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(draft, folder / MANIFEST)


def _is_segment(file: Path) -> bool:
    """Whether tantivy writes the file once and never again (unlike its `meta.json` and locks)."""
    return not file.name.startswith(".") and file.suffix not in (".json", ".draft", ".lock")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parsed((folder / MANIFEST).read_text(encoding="utf-8"))
        return {name: manifest[name] for name in ("format", "fingerprint", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} must be a search index with a readable {MANIFEST}; got {type(error).__name__}; build it again"
        ) from error


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """RunError where a file is not as it was written; one that is gone is left to tantivy."""
    if manifest["format"] != FORMAT:
        raise RunError(
            f"{folder} must be a search index of format {FORMAT}; got {manifest['format']!r}; build it again"
        )
    for name, checksum in manifest["files"].items():
        file = folder / name
        if file.is_file() and _checksum(file) != checksum:
            raise RunError(f"{folder} must be a search index as it was built; {name} has changed; build it again")


def _checksum(file: Path) -> list[int]:
    """Size in bytes and CRC-32 of the first and last 8 MB, so that a large index opens fast."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        crc = zlib.crc32(stream.read(_ENDS_BYTES))
        stream.seek(max(stream.tell(), size - _ENDS_BYTES))
        return [size, zlib.crc32(stream.read(), crc)]


def _replace_folder(draft: Path, folder: Path) -> None:
    """Puts `draft` in the place of `folder`, unless another process has just put one there."""
    if folder.exists():
        old = draft.with_name(f"{draft.name}-old")
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(draft, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


@contextlib.contextmanager
def _index_errors(must: str, remedy: str) -> Iterator[None]:
    """Turns what tantivy and the file system raise into a RunError of one line."""
    try:
        yield
    except TurnwiseError:
        raise
    except BaseException as error:
        if not isinstance(error, OSError | ValueError) and type(error).__name__ != "PanicException":
            raise
        raise RunError(f"{must}; got {' '.join(str(error).split())[:200]}; {remedy}") from error


# ------------------------------------------------------------------------ terms and documents


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("name", stored=False, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("all", stored=False, tokenizer_name=_ANALYSER, index_option="freq")
    builder.add_bytes_field("title", stored=True)  # bytes: a text field cannot go unindexed
    builder.add_bytes_field("text", stored=True)
    return builder.build()


def _document(article: ArticleLike) -> tantivy.Document:
    name, title, text = map(_encodable, (article.id, article.title, article.text))
    return tantivy.Document(
        id=name,
        name=" ".join(_analyser().analyze(title)),
        title=title.encode(),
        text=text.encode(),
        all=f"{title} {text}",
    )


def _hit(document: tantivy.Document, score: float) -> Hit:
    name, title, text = (document.get_first(field) for field in ("id", "title", "text"))
    return Hit(id=name or "", title=(title or b"").decode(), text=(text or b"").decode(), score=score)


def _words() -> tantivy.TextAnalyzerBuilder:
    """Runs of letters and digits, in lower case, without accents."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    filters = (
        tantivy.Filter.remove_long(60),
        tantivy.Filter.lowercase(),
        tantivy.Filter.ascii_fold(),
    )
    return functools.reduce(lambda chain, step: chain.filter(step), filters, builder)


@functools.cache
def _analyser() -> tantivy.TextAnalyzer:
    return _words().filter(tantivy.Filter.stemmer("english")).build()


@functools.cache
def _query_analyser() -> tantivy.TextAnalyzer:
    dropped = tantivy.Filter.custom_stopword(_STOP_WORDS.split())
    return _words().filter(dropped).filter(tantivy.Filter.stemmer("english")).build()


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which no file holds, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")
