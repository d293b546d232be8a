"""Corpora: a stream of articles from a file, from a folder, or from the embedded atlas."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from turnwise.errors import InputError
from turnwise.records import (
    Record,
    field_error,
    id_field,
    note_id,
    read_lines,
    read_records,
    text_field,
)

ATLAS = "atlas"
"""The name that stands for the embedded corpus."""
PASSAGE_WORDS = 100
"""Most words of a passage that a text file is split into."""
TEXT_SUFFIXES = (".txt", ".md", ".markdown")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


class ArticleLike(Protocol):
    """Anything with an id, a title (which may be empty) and a text."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Article:
    """One passage that a search can find."""

    id: str
    title: str
    text: str


def load_corpus(spec: str | Path) -> Iterator[ArticleLike]:
    """The articles of a corpus, one after the other.

    `spec` is `atlas`, a JSON-lines file (`.gz` too) whose objects have `id` and either `text` and
    optionally `title` or, as pyserini and Search-R1 write it, `contents` with the title as first
    line, a text or Markdown file, or a folder of those. Raises InputError at once for a missing
    corpus, and on reading for a malformed line (`file:line`), an id that comes twice, and a corpus
    without articles.
    """
    if str(spec) == ATLAS:
        from turnwise.atlas import articles  # a later layer, needed for this one name only

        return iter(articles())
    path = Path(spec)
    if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES:
        return _text_articles(path, corpus_files(path))
    corpus_files(path)
    return _json_articles(path)


def corpus_files(path: Path) -> list[Path]:
    """The files that a corpus is read from, sorted; InputError where there are none.

    Of a folder: every text and Markdown file in it and below, hidden ones left out; a link among them must lead to one.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"a corpus must be {ATLAS!r}, a JSON-lines file or a folder of text files; "
            f"got {str(path)!r}, which does not exist; check the path"
        )
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in TEXT_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not file.is_dir()
    ]
    for file in found:
        if not file.exists():
            raise InputError(f"{file} must be a text file; it is a link to nothing; mend or delete it")
    if not found:
        raise InputError(f"{path} must hold text files ({', '.join(TEXT_SUFFIXES)}); it has none; check the folder")
    return found


# ----------------------------------------------------------------------------- JSON lines


def _json_articles(path: Path) -> Iterator[Article]:
    seen: dict[str, str] = {}
    for number, record in read_records(path):
        article = article_from_record(record, f"{path}:{number}")
        note_id(article.id, f"{path}:{number}", seen)
        yield article


def article_from_record(record: Record, where: str) -> Article:
    """The article that a JSON object describes; `where` begins the text of an InputError."""
    if "contents" in record and "text" not in record:
        title, text = split_contents(text_field(record, "contents", where))
    else:
        title, text = record.get("title") or "", text_field(record, "text", where)
    if not isinstance(title, str):
        raise field_error(where, "title", "a string", record)
    return Article(id=id_field(record, where), title=title, text=text)


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of a `contents` field: the first line, unquoted, and what follows it.

    One line alone is a text without title.
    """
    first, newline, rest = contents.strip().partition("\n")
    return (first.strip().strip('"'), rest.strip()) if newline else ("", first)


def joined_contents(article: ArticleLike) -> str:
    """Title and text as one `contents` field: the quoted title on its own line, then the text."""
    return f'"{article.title}"\n{article.text}'


# ----------------------------------------------------------------------------- text files


def _text_articles(root: Path, files: list[Path]) -> Iterator[Article]:
    """Articles of text files: their ids are the path below `root`, `#` and the passage's number."""
    empty = True
    for file in files:
        title, text = _title_and_text(file)
        name = file.relative_to(root).as_posix() if file != root else file.name
        for number, passage in enumerate(passages(text)):
            empty = False
            yield Article(id=f"{name}#{number}", title=title, text=passage)
    if empty:
        raise InputError(f"{root} must hold text; every file in it is empty; check the folder")


def _title_and_text(file: Path) -> tuple[str, str]:
    """A text file's first heading, or else its name in words, and the text without that heading."""
    lines: dict[int, str] = dict(read_lines(file))
    title = ""
    for number, line in lines.items():
        heading = _HEADING.match(line) if file.suffix.lower() != ".txt" else None
        if heading and heading[1]:
            title = heading[1]
            del lines[number]
            break
    numbers = range(1, max(lines, default=0) + 1)
    text = "\n".join(lines.get(number, "") for number in numbers)
    return title or re.sub(r"[-_\s]+", " ", file.stem).strip(), text


def passages(text: str, max_words: int = PASSAGE_WORDS) -> list[str]:
    """`text` in passages of at most `max_words` words, cut between sentences where it can be."""
    found: list[list[str]] = []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if found and len(found[-1]) + len(words) <= max_words:
            found[-1].extend(words)
        else:
            found += [words[i : i + max_words] for i in range(0, len(words), max_words)]
    return [" ".join(words) for words in found]
