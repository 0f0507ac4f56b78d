"""How does a build survive a kill at any moment? Each batch is a file, written beside and moved into place.

A draft folder holds the plan of a build, its batches by number, and at the end the files of the finished set.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.refsets.arrays import ArrayFile, write_header
from ttrouting.refsets.manifest import DATA_FILES, DRAFT, MANIFEST, digest, write_file, write_manifest
from ttrouting.refsets.recipe import Counts
from ttrouting.refsets.writing import Block, write_set

PLAN = "plan.json"
BATCH_ARRAYS = {
    "lengths": ("I64", 1),
    "embeddings": ("F16", 2),
    "omega": ("F16", 3),
    "correct": ("U8", 1),
    "text": ("U8", 1),
    "counts": ("U8", 1),
}


class Draft:
    """The part of a set that is done. Made by `open_draft`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / DRAFT
        self._batches = sorted(self.folder.glob("batch-*.safetensors"))
        self._bytes = sum(file.stat().st_size for file in self._batches)
        if self._batches != [self._batch(number) for number in range(len(self._batches))]:
            raise ArtefactError(f"{self.folder} lacks some of its batches. Begin again with restart (--restart).")

    @property
    def counts(self) -> Counts:
        """Of the last batch: how far the source is read."""
        if not self._batches:
            return Counts()
        return Counts(**json.loads(ArrayFile(self._batches[-1], BATCH_ARRAYS).read("counts").tobytes()))

    def commit(
        self,
        lines: Sequence[bytes],
        correct: NDArray[np.bool_],
        embeddings: NDArray[np.float16],
        omega: NDArray[np.float16],
        counts: Counts,
    ) -> None:
        """Add a batch: n lines, `[n]`, `[n, D]`, `[n, L, E]`, and the counts up to here."""
        arrays: dict[str, NDArray[Any]] = {
            "lengths": np.array([len(line) for line in lines], np.int64),
            "embeddings": embeddings,
            "omega": omega,
            "correct": correct.astype(np.uint8),
            "text": np.frombuffer(b"".join(lines), np.uint8),
            "counts": np.frombuffer(json.dumps(asdict(counts)).encode(), np.uint8),
        }
        file = self._batch(len(self._batches))
        data = BytesIO()
        write_header(data, {name: (BATCH_ARRAYS[name][0], array.shape) for name, array in arrays.items()})
        for array in arrays.values():
            data.write(array.tobytes())
        with safely(self.out):
            write_file(file, data.getvalue())
        self._batches.append(file)
        self._bytes += file.stat().st_size

    def check_space(self, total: int) -> None:
        """Refuse to go on where the disk will not hold the set, if records are kept at the rate so far.

        Args:
            total: how many records of the source will be read.
        """
        counts = self.counts
        whole = self._bytes * total / max(counts.read, 1)
        needed = 2 * whole - self._bytes  # the rest of the batches, then the set itself beside them
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise ArtefactError(
                f"{self.out} will need about {needed / 1e6:.0f} MB more, its disk has {free / 1e6:.0f} MB free. "
                f"Free some and run the same again: {counts.records} records are kept and safe. Or use a limit."
            )

    def blocks(self) -> Iterator[Block]:
        """All batches, one at a time."""
        for file in self._batches:
            arrays = ArrayFile(file, BATCH_ARRAYS)
            yield Block(*(arrays.read(name) for name in ("text", "lengths", "correct", "embeddings", "omega")))

    def finish(self, manifest: dict[str, Any], centred: bool) -> None:
        """Make the set of the batches and drop the draft. A kill in between leaves a draft that can do it again.

        Args:
            manifest: all but sizes and files, which are filled in here. centred: as in `write_set`.
        """
        count, sizes = 0, (0, 0, 0)
        for file in self._batches:
            arrays = ArrayFile(file, BATCH_ARRAYS)
            count += arrays.shape("lengths")[0]
            _, layers, experts = arrays.shape("omega")
            sizes = (arrays.shape("embeddings")[1], layers, experts)
        final = self.folder / "final"
        manifest["embedder"]["dimension"] = sizes[0]
        manifest["sites"] |= {"layers": sizes[1], "experts": sizes[2]}
        with safely(self.out):
            final.mkdir(exist_ok=True)
            manifest["files"] = write_set(final, self.blocks(), count, sizes, centred)
            for name in DATA_FILES:
                (final / name).replace(self.out / name)
            write_manifest(self.out / MANIFEST, manifest)  # from here on the folder is a set
            self.drop()

    def drop(self) -> None:
        """Remove the draft."""
        _clear(self.folder)
        shutil.rmtree(self.folder)

    def _batch(self, number: int) -> Path:
        return self.folder / f"batch-{number:08d}.safetensors"


@contextmanager
def open_draft(out: Path, plan: dict[str, Any], restart: bool) -> Iterator[Draft]:
    """The draft in a folder, begun or taken up; no other process can have it inside the block.

    Args:
        out: folder of the set. plan: everything that decides what is in the set. restart: drop what is there.

    Raises:
        ArtefactError: the folder holds other things, or cannot be written; the draft is damaged.
        ConfigError: the draft was begun under another plan, or another process works on it.
    """
    folder = out / DRAFT
    if out.exists() and not folder.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise ArtefactError(f"{out} exists and was not written by 'ttrouting refset build'. Choose another path.")
    with ExitStack() as opened:
        with safely(out):
            folder.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context((folder / "lock").open("w"))
            _lock(lock, out)
            if restart:
                _clear(folder)
            if not (folder / PLAN).exists() and not any(folder.glob("batch-*")):
                write_manifest(folder / PLAN, plan)
        check_plan(_read_plan(folder / PLAN), plan, f"{out} holds a build", "begin again with restart (--restart)")
        yield Draft(out)


def check_plan(before: dict[str, Any], now: dict[str, Any], what: str, way_out: str) -> None:
    """Refuse to go on under another plan.

    Raises:
        ConfigError: says what differs.
    """
    apart = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now} - {"sha256"})
        if before.get(name) != now.get(name)
    ]
    if apart:
        raise ConfigError(
            f"{what} with other options: {'; '.join(apart)}. Use the former ones, {way_out}, or choose another path."
        )


@contextmanager
def safely(out: Path) -> Iterator[None]:
    """Say in one line that writing failed, and what is left."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(
            f"Cannot write in {out}: {error.strerror or error}. Make room, or choose another path. What is complete "
            "is kept: the same command goes on from there."
        ) from None


def _clear(folder: Path) -> None:
    """Remove batches from the last one on, the plan at the end: what a kill leaves belongs to its plan."""
    for file in sorted(folder.glob("batch-*"), reverse=True):
        file.unlink()
    (folder / PLAN).unlink(missing_ok=True)


def _lock(file: TextIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConfigError(
                f"Another process is building into {out}. Wait for it, or choose another path."
            ) from None
        # a file system without locks: nothing to hold on to


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        plan = json.loads(file.read_bytes())
    except (OSError, ValueError):
        plan = None
    if not isinstance(plan, dict) or plan.get("sha256") != digest(plan):
        raise ArtefactError(f"{file} is damaged. Begin again with restart (--restart).")
    return plan
