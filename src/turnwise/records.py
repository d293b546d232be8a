"""Records out of files and data sets, and the checks of their fields.

JSON lines, a JSON list, a Parquet file, or a data set of the Hugging Face library (`hf:NAME[:CONFIG][:SPLIT]`, where a
name may be a local folder). A file whose name ends in `.gz` is compressed. JSON needs the standard library only,
Parquet and data sets the extra `data`.
"""

import contextlib
import functools
import gzip
import importlib
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from turnwise.errors import InputError

Record = dict[str, Any]
HUB = "hf:"
"""How the name of a data set begins."""
DATA_EXTRA = 'pip install "turnwise[data]"'
CONTAINERS = ("Data", "data")
"""Under which names TriviaQA's and SQuAD's own files keep their list."""
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(\[.*\])?")
_COLON = re.compile(r":(?![^\[]*\])")
"""A colon that is not inside the brackets of a split such as train[:100]."""
LONGEST_LINE = 64_000_000
"""Most bytes of one line in a file of JSON lines."""
UNPACKED_FREELY, MOST_UNPACKED = 256_000_000, 200
"""A compressed file may unpack to so many bytes, or to so many times its own size; text is about 5 times."""
_SAVED = ("dataset_dict.json", "state.json")
"""What a data set that was saved to a folder has there."""


def read_rows(source: str | Path, split: str = "train") -> Iterator[tuple[str, Record]]:
    """Every record of a source, with where it stands, as errors say it; `split` is a data set's, where none is named.

    Raises InputError where the source is missing or cannot be read, holds nothing, or holds anything but JSON objects.
    """
    if str(source).startswith(HUB):
        yield from _hub_rows(str(source), split)
        return
    path = Path(source)
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif name.endswith(".json"):
        yield from _json_rows(path)
    else:
        for number, record in read_records(path):
            yield f"{path}:{number}", record


# -------------------------------------------------------------------------- lines of JSON


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def bounded_lines(file: IO[bytes] | gzip.GzipFile, name: str | Path, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a file; InputError, with the line's number, at one that is longer, which is not read."""
    for number, line in enumerate(iter(functools.partial(file.readline, longest + 1), b""), start=1):
        if len(line) > longest:
            raise InputError(f"{name}:{number} must be a line of at most {longest} bytes; it is longer; split the file")
        yield line


def read_lines(path: Path, *, longest: int = LONGEST_LINE) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 text file, `.gz` included; blank lines are left out.

    Raises InputError where the file is missing, is no text, is cut off, has a line that is longer than `longest`, or
    unpacks to far more than text does.
    """
    number = size = 0
    try:
        packed = path.stat().st_size if path.suffix == ".gz" else None
        with gzip.open(path) if packed is not None else path.open("rb") as file:
            for number, line in enumerate(bounded_lines(file, path, longest), start=1):
                size += len(line)
                if packed is not None and size > max(UNPACKED_FREELY, MOST_UNPACKED * packed):
                    raise InputError(
                        f"{path} must be packed text; it unpacks to more than {MOST_UNPACKED} times its size; unpack "
                        "it yourself if it is meant to"
                    )
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a file; there is none; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: the text must be UTF-8; got byte {error.object[error.start]:#04x}; convert the file"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file; line {number + 1}: {error}; fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} must be a readable file; got {error.strerror}; check the path") from error


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The JSON objects of a JSON-lines file, each with its line number.

    Raises InputError at the first line that holds no JSON object, and where there is none at all.
    """
    empty = True
    for number, text in read_lines(path):
        empty = False
        yield number, record_of_line(f"{path}:{number}", text)
    if empty:
        raise InputError(f"{path} must hold one JSON object a line; it is empty; fill the file")


def record_of_line(where: str, text: str) -> Record:
    """The JSON object of a line; `where` begins the text of an InputError."""
    try:
        value = parsed(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(
            f"{where}: each line must be one JSON object; got {shown(text)} ({reason}); write JSON lines"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: each line must be one JSON object; got {shown(value)}; write JSON lines")
    return value


# ------------------------------------------------------------------------ one JSON value


def _json_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """The objects of a JSON list, of the list in a container, or of lines after all; one object alone is one record."""
    lines = [*read_lines(path, longest=sys.maxsize // 2)]  # all of it is one value
    if not lines:
        raise InputError(f"{path} must hold JSON; it is empty; fetch it again")
    try:
        value = parsed("\n".join(text for _, text in lines))
    except ValueError as error:
        if _is_object(lines[0][1]):
            yield from ((f"{path}:{number}", record_of_line(f"{path}:{number}", text)) for number, text in lines)
            return
        raise InputError(f"{path} must hold JSON; got {error}; fetch it again") from error
    items = _items(value)
    if not items:
        raise InputError(f"{path} must hold a list of JSON objects; got {shown(value)}; fill the file")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise InputError(f"{path}: item {number} must be a JSON object; got {shown(item)}; correct the file")
        yield f"{path}: item {number}", item


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        inner = next((value[name] for name in CONTAINERS if isinstance(value.get(name), list)), None)
        return [value] if inner is None else inner
    return value if isinstance(value, list) else []


def _is_object(line: str) -> bool:
    try:
        return isinstance(parsed(line), dict)
    except ValueError:
        return False


# ------------------------------------------------------------------ Parquet and data sets


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    parquet: Any = _extra("pyarrow.parquet", "a Parquet file")
    if not path.is_file():
        raise InputError(f"{path} must be a file; there is none; check the path")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", _plain(record)
    except (OSError, ValueError) as error:  # the library's own errors are of both kinds
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} must be a Parquet file; got {_first_line(error)}; fetch it again") from error
    if not number:
        raise InputError(f"{path} must hold rows; it has none; fill the file")


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of `hf:NAME[:CONFIG][:SPLIT]`; of two parts the second is a split if it looks so.

    Raises InputError where there is no name or there are more parts.
    """
    name, *parts = _COLON.split(source.removeprefix(HUB))
    if not name or len(parts) > 2:
        raise InputError(f"a data set must be {HUB}NAME[:CONFIG][:SPLIT]; got {source!r}; write for example hf:squad")
    if len(parts) == 1 and _SPLIT.fullmatch(parts[0]):
        return name, None, parts[0]
    config, split = (*parts, "", "")[:2]
    return name, config or None, split or None


def _hub_rows(source: str, default: str) -> Iterator[tuple[str, Record]]:
    name, config, wanted = hub_parts(source)
    found = _data_set(source, name, config, wanted)
    if hasattr(found, "keys"):  # several splits, by name
        split = wanted or (default if default in found else next(iter(found)) if len(found) == 1 else "train")
        if split not in found:
            raise InputError(
                f"the split of {source} must be one of {', '.join(found)}; got {split}; write {HUB}{name}:SPLIT"
            )
        found = found[split]
    number = 0
    for number, record in enumerate(found, start=1):
        yield f"{source}: row {number}", _plain(record)
    if not number:
        raise InputError(f"{source} must hold rows; it has none; name another split")


def _data_set(source: str, name: str, config: str | None, split: str | None) -> Any:
    """A data set, or its splits by name; from a folder that it was saved to, or as the library finds it."""
    datasets: Any = _extra("datasets", "a data set of Hugging Face")
    folder = Path(name)
    try:
        with _without_bars(datasets):
            if any((folder / file).is_file() for file in _SAVED):
                return datasets.load_from_disk(name)
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and its network raise many kinds
        raise InputError(
            f"{source} must name a folder with data, or a data set that can be fetched; got {type(error).__name__}: "
            f"{_first_line(error)}; check the name and the network, or give a local folder ({HUB}path/to/folder)"
        ) from error


@contextlib.contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    drawn = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def _extra(module: str, what: str) -> Any:
    """A module of the extra `data`; InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{what} must have {module.split('.')[0]} to read it; install it: {DATA_EXTRA}") from error


def _plain(record: Mapping[str, Any]) -> Record:
    """A row in JSON's types, so that it can be written to files again: dates and the like become text."""
    return json.loads(json.dumps(record, default=str))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---------------------------------------------------------------------------------- fields


def text_field(record: Record, name: str, where: str) -> str:
    """A field that must be a string with something in it; InputError otherwise."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    raise field_error(where, name, "a string that is not blank", record)


def id_field(record: Record, where: str) -> str:
    """The field `id`: a string that is not blank, or a whole number, which becomes a string."""
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, "id", where)


def note_id(name: str, where: str, seen: dict[str, str]) -> None:
    """Writes where an id stands into `seen`; InputError where an earlier record has the id."""
    if name in seen:
        raise InputError(f"{where}: field 'id' must be unique; got {name!r}, which {seen[name]} has too; rename one")
    seen[name] = where


def field_error(where: str, name: str, expected: str, record: Record) -> InputError:
    """The error of a field that does not hold what it must."""
    if name in record:
        came = f"got {shown(record[name])}"
    else:
        came = f"it is missing among the fields {shown(', '.join(record) or 'none')}"
    return InputError(f"{where}: field {name!r} must be {expected}; {came}; correct the line")


def shown(value: object) -> str:
    """A value as JSON on one line, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
