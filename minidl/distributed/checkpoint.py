"""Checkpoints of many ranks: each writes its part, and the last word makes it count.

    FOLDER/step-00000120/shared.safetensors     what is the same on all ranks, written by rank 0
    FOLDER/step-00000120/rank-1.safetensors     what is rank 1's own, one for each rank
    FOLDER/step-00000120/manifest.json          the step, the ranks; each file's size and checksum

Each file is written under another name, flushed to the disk, and renamed. The manifest comes last,
when every rank has written: a folder without one was never finished, and counts for nothing. So
whichever process dies at whatever moment, the checkpoint before it is whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import minidl.distributed as dist
from minidl import serialization
from minidl.distributed.communicator import Communicator

T = TypeVar("T")
MANIFEST, SHARED, VERSION = "manifest.json", "shared.safetensors", 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is of another number of ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is complete. `latest` finds it."""

    path: Path
    step: int
    world_size: int

    def shared(self) -> dict[str, Any]:
        """What was the same on all ranks."""
        return serialization.load(self.path / SHARED)

    def own(self, rank: int) -> dict[str, Any]:
        """What was the own of one rank, of those that wrote it."""
        return serialization.load(self.path / shard(rank))


def save(
    folder: Path | str,
    step: int,
    shared: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    communicator: Communicator | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint. All ranks call it together, with a folder that they have in common.

    Args:
        folder: of all checkpoints of a run.
        step: the number of this one; of the same number replaces it.
        shared: what is the same on all ranks (of rank 0 it is written); as for `minidl.save`.
        own: what is this rank's own.
        communicator: of the ranks (default: all).
        keep: delete all complete ones but the last so many, and what was never finished.

    Returns:
        Its folder.

    Raises:
        ValueError: step is negative, keep is not positive.
        OSError, TypeError: a rank cannot write its file, raised on all ranks.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step is at least 0 and keep at least 1, got {step} and {keep}")
    ranks = communicator or dist.communicator()
    path = Path(folder) / f"step-{step:08d}"

    def begin() -> None:
        remove(path)
        path.mkdir(parents=True)

    def write() -> dict[str, Any]:
        files = {shard(ranks.rank): own or {}}
        if ranks.rank == 0:
            files[SHARED] = shared
        for name, content in files.items():
            serialization.save(dict(content), path / name)
        return {name: fingerprint(path / name) for name in files}

    def finish(files: list[dict[str, Any]]) -> None:
        every = {name: found for some in files for name, found in some.items()}
        content = {"version": VERSION, "step": step, "ranks": ranks.world_size, "files": every}
        with serialization.atomic_path(path / MANIFEST) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        complete = complete_ones(path.parent)
        for old in path.parent.glob("step-*"):
            if old in complete[:-keep] or (old not in complete and old < path):
                remove(old)

    together(ranks, lambda: begin() if ranks.rank == 0 else None)
    files = together(ranks, write)
    together(ranks, lambda: finish(files) if ranks.rank == 0 else None)
    return path


def latest(
    folder: Path | str, communicator: Communicator | None = None, any_ranks: bool = False
) -> Checkpoint | None:
    """The last complete checkpoint of a folder, or None if it has none. All ranks call it together.

    Every file's size and checksum are verified, the work dealt out over the ranks. Where one is
    wrong, a warning names it, and the checkpoint before it is taken.

    Args:
        folder: of all checkpoints of a run.
        communicator: of the ranks (default: all).
        any_ranks: accept one that another number of ranks has written.

    Raises:
        CheckpointError: none can be used; or it is of another number of ranks.
    """
    ranks = communicator or dist.communicator()
    # Rank 0 looks, and all verify: a rank that has another folder is found out.
    paths = together(ranks, lambda: complete_ones(Path(folder)) if ranks.rank == 0 else [])[0]
    found: list[str] = []
    for path in reversed(paths):
        problems = together(ranks, lambda path=path: verify(path, ranks))  # type: ignore[misc]
        if any(problems):
            found += [text for some in problems for text in some]
            continue
        if found and ranks.rank == 0:
            warnings.warn(f"going on from {path}, since {'; '.join(found)}", stacklevel=2)
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["ranks"] != ranks.world_size and not any_ranks:
            raise CheckpointError(
                f"{path} was written by {manifest['ranks']} ranks, and these are "
                f"{ranks.world_size}: start as many (-n {manifest['ranks']}), or take another "
                "folder to start anew"
            )
        return Checkpoint(path, manifest["step"], manifest["ranks"])
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} can be used: {'; '.join(found)}. Bring the files back (all "
            "ranks must see the same folder), or delete it to start anew"
        )
    return None


def verify(path: Path, ranks: Communicator) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
        expected = {SHARED, *map(shard, range(manifest["ranks"]))}
        if version > VERSION:
            return [f"{path / MANIFEST} is of a newer minidl (format {version})"]
        if not expected <= files.keys() or not isinstance(manifest["step"], int):
            raise ValueError(f"lacks {', '.join(sorted(expected - files.keys())) or 'the step'}")
    except OSError as error:
        return [f"rank {ranks.rank} cannot read {path / MANIFEST} ({error.strerror})"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{path / MANIFEST} is damaged ({error})"]
    problems = []
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
        try:
            now = fingerprint(path / name)
        except OSError as error:
            problems.append(f"rank {ranks.rank} cannot read {path / name} ({error.strerror})")
            continue
        if now != files[name]:
            sizes = f"{now['bytes']:,} bytes where {files[name]['bytes']:,} were written"
            problems.append(f"{path / name} is damaged ({sizes}; the checksum differs)")
    return problems


def complete_ones(folder: Path) -> list[Path]:
    """The folders of finished checkpoints, oldest first."""
    return sorted(manifest.parent for manifest in folder.glob(f"step-*/{MANIFEST}"))


def remove(path: Path) -> None:
    """Delete a checkpoint: first its manifest, so that no half of one counts."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def shard(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def fingerprint(path: Path) -> dict[str, int]:
    """A file's size and CRC-32: enough to notice what disks and copies do to a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def together(ranks: Communicator, action: Callable[[], T]) -> list[T]:
    """What an action returned on each rank. What it raises on one is raised on all."""
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    every = ranks.all_gather_object((result, error))
    for other in (error, *(theirs for _, theirs in every)):
        if other is not None:
            raise other
    return [theirs for theirs, _ in every]
