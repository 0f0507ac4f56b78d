"""Which vectors are compared? Unit vectors; for the model's own embeddings centred and scaled first.

Mean-pooled hidden states are nearly parallel: uncentred, every text is above 0.95 similar to every other one.

Legend: `B` queries, `N` references, `D` embedding dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ConfigError

Floats = NDArray[np.floating[Any]]
CHUNK = 16384  # rows read at a time from a memory map: tens of megabytes in fp32
CONSTANT = 1e-6  # a dimension of unit vectors that varies less than this says nothing


class Vectors:
    """The vectors of a set, computed from its stored rows as they are read; nothing is held.

    `vectors[2:7]` and `vectors[[4, 1]]` give `[n, D]` fp32, unit length.

    Args:
        rows: `[N, D]` unit vectors of any float type, may be a memory map.
        mean, scale: `[D]` fp32 of `centring`, or None: rows are compared as they are.
    """

    def __init__(self, rows: Floats, mean: Floats | None = None, scale: Floats | None = None) -> None:
        self.rows, self.mean, self.scale = rows, mean, scale

    @property
    def dimension(self) -> int:
        return int(self.rows.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self._compared(np.asarray(self.rows[which], dtype=np.float32))

    def query(self, raw: Floats) -> NDArray[np.float32]:
        """Raw embeddings `[B, D]` as vectors to compare, fp32.

        Raises:
            ConfigError: no matrix, another dimension than the set's, a number that is not finite, a zero vector.
        """
        raw = np.asarray(raw)
        if raw.ndim != 2 or raw.shape[1] != self.dimension:
            raise ConfigError(
                f"Query embeddings have shape {list(raw.shape)}, this set compares [B, {self.dimension}]. "
                "Embed the queries with the embedder that the set was built with."
            )
        return self._compared(unit(raw, "query"))

    def _compared(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.mean is not None and self.scale is not None:
            rows = np.asarray((rows - self.mean) / self.scale, dtype=np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        # a row that is the mean itself has no direction: it stays 0, with similarity 0 to everything
        return np.asarray(rows / np.where(length > 0, length, 1), dtype=np.float32)


def unit(raw: Floats, what: str = "record") -> NDArray[np.float32]:
    """Raw embeddings `[n, D]` divided by their norms, fp32.

    Args:
        what: what a row is, for the message.

    Raises:
        ConfigError: numbers that are not finite, or zero vectors; with their count and the first row's number.
    """
    wide = np.asarray(raw, dtype=np.float64)  # squares of fp16 and fp32 overflow in their own type
    length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        kind = "is zero" if length[bad[0]] == 0 else "has numbers that are not finite"
        raise ConfigError(
            f"{len(bad)} of {len(wide)} embeddings cannot be compared; the first, of {what} {bad[0]}, {kind}. "
            "Check the embedder, and the model's dtype where the model embeds."
        )
    return np.asarray(wide / length[:, None], dtype=np.float32)


def centring(rows: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation `[D]` fp32 over unit rows `[N, D]`, read in chunks.

    The scale of a dimension that does not vary is 1.
    """
    count = max(len(rows), 1)
    chunks = range(0, len(rows), CHUNK)
    total, square = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for start in chunks:
        total += _wide(rows, start).sum(0)
    mean = total / count
    for start in chunks:
        square += ((_wide(rows, start) - mean) ** 2).sum(0)
    scale = np.sqrt(square / count)
    return mean.astype(np.float32), np.where(scale > CONSTANT, scale, 1).astype(np.float32)


def _wide(rows: Floats, start: int) -> NDArray[np.float64]:
    return np.asarray(rows[start : start + CHUNK], dtype=np.float64)
