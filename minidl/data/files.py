"""Finding, reading and fetching data files."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

from minidl.data.errors import DataError, MissingDataError
from minidl.serialization import atomic_path


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds data: `root`, else what MINIDL_DATA names, else "data" here."""
    return Path(root if root is not None else os.environ.get("MINIDL_DATA") or "data").expanduser()


def find_files(
    root: Path, folders: Sequence[str], names: Sequence[str], suffixes: Sequence[str] = ("",)
) -> list[Path] | None:
    """The files `names` (each with one of the suffixes) in the first folder that has them all."""
    for folder in folders:
        found = [
            next((p for s in suffixes if (p := root / folder / (name + s)).is_file()), None)
            for name in names
        ]
        if all(found):
            return [path for path in found if path]
    return None


def missing(
    what: str, root: Path, folders: Sequence[str], names: Sequence[str], how: str
) -> MissingDataError:
    """The error for files that are not there."""
    sought = "\n".join(f"  {root / folder}" for folder in folders)
    there = "" if root.is_dir() else f" (the folder {root} does not exist)"
    return MissingDataError(
        f"{what} not found{there}. It needs the files\n  {', '.join(names)}\n"
        f"together in one of\n{sought}\n{how}"
    )


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip (whatever its name).

    Raises:
        DataError: it is empty, or damaged gzip.
    """
    content = path.read_bytes()
    if not content:
        raise DataError(f"{path}: the file is empty")
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except EOFError:
            raise DataError(f"{path}: truncated gzip file ({len(content):,} bytes)") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error})") from None
        if not content:
            raise DataError(f"{path}: gzip file of nothing")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls: Sequence[str], path: Path, digest: str) -> None:
    """Fetch a file from the first address that gives it, and check its SHA-256 digest.

    It appears under its name only when it is whole and right; if it is there already, and right,
    nothing is fetched.

    Raises:
        DataError: no address gave the right file; the message says what each answered.
    """
    if path.is_file() and sha256(path) == digest:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = []
    for url in urls:
        print(f"minidl: downloading {url} to {path}", file=sys.stderr, flush=True)
        try:
            with atomic_path(path) as part:
                _fetch(url, part)
                if (found := sha256(part)) != digest:
                    raise DataError(
                        f"SHA-256 is {found}, expected {digest} ({part.stat().st_size:,} bytes)"
                    )
            return
        except (OSError, DataError) as error:  # URLError and time-outs are OSErrors
            answers.append(f"  {url}: {error}")
    raise DataError(
        f"cannot download {path.name}:\n" + "\n".join(answers) + "\nWithout a network, copy the "
        f"file to {path.parent} by hand."
    )


def _fetch(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "minidl"})
    with urllib.request.urlopen(request, timeout=30) as response, open(path, "wb") as file:
        expected = response.headers.get("Content-Length")
        while block := response.read(1 << 20):
            file.write(block)
        if expected is not None and file.tell() != int(expected):
            raise urllib.error.URLError(f"it ended after {file.tell():,} of {expected} bytes")
