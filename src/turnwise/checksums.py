"""Checksums of a folder's files, in the form that `sha256sum -c` reads: damage is noticed and named."""

import hashlib
import os
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
"""The file that lists them."""


def sha256(file: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Lists every file of a folder with its checksum."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != CHECKSUMS]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder's files, by the checksums that were written with them.

    None where each listed file is as it was written, and where the folder lists none, as it is not ours or older.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    listed = [line.split("  ", 1) for line in text.splitlines()]
    if not listed or any(len(entry) != 2 or Path(entry[1]).name != entry[1] for entry in listed):
        return f"{CHECKSUMS} lists no files of this folder"
    for expected, name in listed:
        fault = changed(folder / name, expected)
        if fault:
            return fault
    return None


def changed(file: Path, expected: str) -> str | None:
    """What is wrong with a file that must have a checksum; None where nothing is."""
    try:
        found = sha256(file)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        return f"{file.name} cannot be read: {getattr(error, 'strerror', error)}"
    return None if found == expected else f"{file.name} has changed"


def sync(path: Path) -> None:
    """Has the system put a file, or a folder's list of files, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
