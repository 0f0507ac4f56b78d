"""Are the arrays of a set what its manifest says, by their headers and by their content?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ttrouting.errors import ArtefactError
from ttrouting.refsets.arrays import ArrayFile, Shape
from ttrouting.refsets.manifest import DATA_FILES, EMBEDDINGS, OFFSETS, PATHWAYS, Manifest, check_size, inside
from ttrouting.refsets.vectors import CHUNK
from ttrouting.refsets.writing import CENTRED_ARRAYS, EMBEDDING_ARRAYS, OFFSET_ARRAYS, PATHWAY_ARRAYS


def open_arrays(folder: Path, manifest: Manifest) -> dict[str, ArrayFile]:
    """The array files of a set by name. Looks at sizes and headers only.

    Raises:
        ArtefactError: a file is missing, cut short, or holds other arrays or shapes than the manifest says.
    """
    for name in DATA_FILES:
        check_size(folder, manifest, name)
    count, width = manifest["counts"]["records"], manifest["embedder"]["dimension"]
    centred = manifest["embedder"]["name"] == "model"
    kinds = {
        OFFSETS: OFFSET_ARRAYS,
        EMBEDDINGS: CENTRED_ARRAYS if centred else EMBEDDING_ARRAYS,
        PATHWAYS: PATHWAY_ARRAYS,
    }
    shapes: dict[str, Shape] = {
        "offsets": (count + 1,),
        "correct": (count,),
        "embeddings": (count, width),
        "mean": (width,),
        "scale": (width,),
        "omega": (count, manifest["sites"]["layers"], manifest["sites"]["experts"]),
    }
    found = {name: ArrayFile(inside(folder, name), arrays) for name, arrays in kinds.items()}
    for name, arrays in kinds.items():
        for array in arrays:
            shape = found[name].shape(array)
            if shape != shapes[array]:
                raise ArtefactError(
                    f"{folder / name}: {array} has shape {list(shape)}, by the manifest it is {list(shapes[array])}. "
                    "Build the set again."
                )
    return found


def check_embeddings(arrays: ArrayFile) -> None:
    """Every row must have a direction: a forged file may have a hash that fits. Reads all of them.

    Raises:
        ArtefactError: rows that are zero or not finite, with their number and the first record.
    """
    bad, first, count = 0, 0, arrays.shape("embeddings")[0]
    for start in range(0, count, CHUNK):
        rows = arrays.read("embeddings", start, start + CHUNK)
        found = np.flatnonzero(~np.isfinite(rows).all(1) | ~rows.any(1))
        first = start + int(found[0]) if len(found) and not bad else first
        bad += len(found)
    if bad:
        raise ArtefactError(
            f"{arrays.path}: {bad} of {count} embeddings are zero or not finite, the first of record {first}. "
            "Build the set again."
        )
