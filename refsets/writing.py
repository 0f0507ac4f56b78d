"""How are the data files of a set written, block by block, so that memory does not grow with the set?

Legend: `N` records, `n` records of a block, `D` embedding dimension, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttrouting.refsets.arrays import ArrayFile, Shape, write_header
from ttrouting.refsets.manifest import DATA_FILES, EMBEDDINGS, OFFSETS, PATHWAYS, RECORDS, described
from ttrouting.refsets.vectors import centring

# what is in the files, by name: type and number of dimensions
OFFSET_ARRAYS = {"offsets": ("I64", 1), "correct": ("U8", 1)}
EMBEDDING_ARRAYS = {"embeddings": ("F16", 2)}
CENTRED_ARRAYS = {"mean": ("F32", 1), "scale": ("F32", 1), **EMBEDDING_ARRAYS}
PATHWAY_ARRAYS = {"omega": ("F16", 3)}


@dataclass(frozen=True)
class Block:
    """Some records in a row.

    Attributes:
        text: their lines, as bytes in one `[bytes]` uint8. lengths: `[n]` int64, bytes of each line.
        correct: `[n]` bool or uint8. embeddings: `[n, D]` fp16 unit vectors. omega: `[n, L, E]` fp16.
    """

    text: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    correct: NDArray[Any]
    embeddings: NDArray[np.float16]
    omega: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.lengths)


def write_set(
    folder: Path, blocks: Iterable[Block], count: int, sizes: tuple[int, int, int], centred: bool
) -> dict[str, dict[str, Any]]:
    """Write the data files of a set into a folder.

    Args:
        blocks: all records, in order. count: how many there are. sizes: `(D, L, E)`.
        centred: whether mean and scale of the embeddings are stored with them (for the embedder "model").

    Returns:
        What the manifest says of each file.
    """
    dimension, layers, experts = sizes
    shapes: dict[str, Shape] = {
        "mean": (dimension,),
        "scale": (dimension,),
        "embeddings": (count, dimension),
        "omega": (count, layers, experts),
        "offsets": (count + 1,),
        "correct": (count,),
    }
    correct = bytearray()  # a byte a record: it comes after the offsets, which are written as they are known
    with ExitStack() as files:
        opened = {name: files.enter_context((folder / name).open("wb")) for name in DATA_FILES}
        begin: dict[str, int] = {}
        for name, arrays in (
            (OFFSETS, OFFSET_ARRAYS),
            (EMBEDDINGS, CENTRED_ARRAYS if centred else EMBEDDING_ARRAYS),
            (PATHWAYS, PATHWAY_ARRAYS),
        ):
            begin |= write_header(opened[name], {key: (kind, shapes[key]) for key, (kind, _) in arrays.items()})
        opened[EMBEDDINGS].seek(begin["embeddings"])
        opened[OFFSETS].write(bytes(8))
        end = 0
        for block in blocks:
            opened[RECORDS].write(block.text.tobytes())
            opened[OFFSETS].write((end + np.cumsum(block.lengths)).astype("<i8").tobytes())
            end += int(block.lengths.sum())
            correct += block.correct.astype(np.uint8).tobytes()
            opened[EMBEDDINGS].write(block.embeddings.astype("<f2", copy=False).tobytes())
            opened[PATHWAYS].write(block.omega.astype("<f2", copy=False).tobytes())
        opened[OFFSETS].write(correct)
    if centred:
        _centre(folder / EMBEDDINGS, begin)
    for name in DATA_FILES:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    return {name: described(folder / name) for name in DATA_FILES}


def _centre(file: Path, begin: dict[str, int]) -> None:
    """Fill in mean and scale of the embeddings that the file holds already."""
    mean, scale = centring(ArrayFile(file, CENTRED_ARRAYS).map("embeddings"))
    with file.open("r+b") as opened:
        for name, values in (("mean", mean), ("scale", scale)):
            opened.seek(begin[name])
            opened.write(values.astype("<f4").tobytes())
