"""Which references are nearest? Exact similarities, leakage dropped, the same answer on every run.

    vectors = Vectors(rows, mean, scale)  # of the set
    find(vectors, vectors.query(raw), k, index=index, allowed=correct)  # by embedding
    find_pathways(omega, query_omega, layers, k, allowed=correct, vectors=vectors, embedded=vectors.query(raw))

An index only proposes: similarities are measured on the stored vectors, and where an index cannot propose enough
the set is read through. So leakage that is dropped never shortens a list while there are other references.

Legend: `B` queries, `N` references, `D` embedding dimension, `L` MoE layers, `E` experts, `k` neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ConfigError
from ttrouting.refsets import index as indexes
from ttrouting.refsets.vectors import CHUNK, Floats, Vectors

LEAKAGE = 0.95
GROWTH = 16  # so many times more candidates where too few of the first ones may stay
MOST = 2048  # more than this costs an index as much as reading the set through
ROUNDING = 1e-5  # similarities closer than this may come from an index in either order


@dataclass(frozen=True)
class Neighbours:
    """The nearest references of each query, nearest first; equally near ones by their number.

    Attributes:
        index: `[B, k]` int64, number of the reference; -1 where there is no further one.
        similarity: `[B, k]` fp32, cosine of the compared embeddings; nan at -1, and where no embedding was given.
        distance: `[B, k]` fp32, in the space that was searched; inf at -1.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float32]
    distance: NDArray[np.float32]


def find(
    vectors: Vectors,
    queries: NDArray[np.float32],
    k: int,
    *,
    index: Any | None = None,
    allowed: NDArray[np.bool_] | None = None,
    max_similarity: float = LEAKAGE,
    eps: float | None = None,
) -> Neighbours:
    """The nearest references by embedding.

    Args:
        queries: `[B, D]` fp32 unit vectors, from `vectors.query`. k: how many neighbours at most.
        index: FAISS index over the same vectors; None reads the set through, which is exact.
        allowed: `[N]`, which references may be found; None: all.
        max_similarity: references with a higher cosine are dropped as leakage; 1 keeps all.
        eps: only references within this distance, `sqrt(2 - 2 cosine)`; then a list may be shorter than k.

    Raises:
        ConfigError: an option out of range, or k larger than the number of references that may be found.
    """
    usable = _usable(len(vectors), k, allowed, max_similarity, eps)
    best = _Best(len(queries), k)
    todo = list(range(len(queries)))
    if index is not None:
        todo = _propose(best, todo, vectors, queries, index, allowed, usable, max_similarity)
    if todo:
        _read_through(best, todo, vectors, queries, allowed, max_similarity)
    distance = np.sqrt(2 * best.key.astype(np.float64)).astype(np.float32)
    if eps is not None:
        outside = distance > eps
        best.drop(outside)
        distance[outside] = np.inf
    return Neighbours(best.index, best.similarity, distance)


def _propose(
    best: _Best,
    todo: list[int],
    vectors: Vectors,
    queries: NDArray[np.float32],
    index: Any,
    allowed: NDArray[np.bool_] | None,
    usable: int,
    max_similarity: float,
) -> list[int]:
    """Fill `best` from what an index proposes. Returns the queries for which that was not enough."""
    k = best.index.shape[1]
    fetch = indexes.candidates(index, k)
    while todo and fetch <= min(MOST, usable // 4):
        _, proposed = indexes.search(index, queries[todo], fetch, allowed)
        short = []
        for row, ids in zip(todo, proposed, strict=True):
            ids = np.sort(ids[ids >= 0])
            similarity = _cosine(vectors[ids], queries[row])
            keep = similarity <= max_similarity
            best.clear(row)
            best.offer(row, ids[keep], 1 - similarity[keep], similarity[keep])
            # a tie at the edge of what was proposed may go on beyond it
            if best.index[row, -1] < 0 or best.similarity[row, -1] <= similarity.min() + ROUNDING:
                short.append(row)
        todo = short
        fetch *= GROWTH
    return todo


def _read_through(
    best: _Best,
    todo: list[int],
    vectors: Vectors,
    queries: NDArray[np.float32],
    allowed: NDArray[np.bool_] | None,
    max_similarity: float,
) -> None:
    """Fill `best` for some queries from the whole set."""
    for row in todo:
        best.clear(row)
    for start in range(0, len(vectors), CHUNK):
        rows = vectors[start : start + CHUNK]
        may = _part(allowed, start, len(rows))
        for row in todo:
            similarity = _cosine(rows, queries[row])
            keep = np.flatnonzero(may & (similarity <= max_similarity))
            best.offer(row, start + keep, 1 - similarity[keep], similarity[keep])


def find_pathways(
    omega: Floats,
    queries: Floats,
    layers: list[int],
    k: int,
    *,
    allowed: NDArray[np.bool_] | None = None,
    vectors: Vectors | None = None,
    embedded: NDArray[np.float32] | None = None,
    max_similarity: float = LEAKAGE,
) -> Neighbours:
    """The nearest references by pathway: Euclidean distance of the scores at some layers. Reads the set through.

    Args:
        omega: `[N, L, E]` of the set, may be a memory map. queries: `[B, len(layers), E]`.
        layers: which of the L layers the queries have. k, allowed: as in `find`.
        vectors, embedded: of the set, and `[B, D]` of the queries from `vectors.query`: references whose EMBEDDING
            has a higher cosine than `max_similarity` are dropped as leakage. Without them none is.

    Raises:
        ConfigError: as `find`; queries of another shape than the set's pathways, or not finite.
    """
    _usable(len(omega), k, allowed, max_similarity, None)
    queries = np.asarray(queries, dtype=np.float32)
    if not all(0 <= layer < omega.shape[1] for layer in layers) or queries.shape[1:] != (len(layers), omega.shape[2]):
        raise ConfigError(
            f"Queries have shape {list(queries.shape)} for layers {layers}; the set's pathways have "
            f"{omega.shape[1]} layers of {omega.shape[2]} experts. Use a set of the same model."
        )
    if not np.isfinite(queries).all():
        raise ConfigError("Pathways to search for hold numbers that are not finite. Check the model's dtype.")
    best = _Best(len(queries), k)
    for start in range(0, len(omega), CHUNK):
        paths = np.asarray(omega[start : start + CHUNK][:, layers], dtype=np.float32)
        may = _part(allowed, start, len(paths))
        rows = None if vectors is None or embedded is None else vectors[start : start + CHUNK]
        for row, query in enumerate(queries):
            if rows is None or embedded is None:
                similarity = np.full(len(paths), np.nan, dtype=np.float32)
            else:
                similarity = _cosine(rows, embedded[row])
            keep = np.flatnonzero(may & ~(similarity > max_similarity))
            apart = (paths[keep] - query).reshape(len(keep), -1)
            best.offer(row, start + keep, np.einsum("np,np->n", apart, apart), similarity[keep])
    return Neighbours(best.index, best.similarity, np.sqrt(best.key))


class _Best:
    """The k best of what was offered to each query. Offers of a query come in ascending order of numbers."""

    def __init__(self, batch: int, k: int) -> None:
        self.index = np.full((batch, k), -1, dtype=np.int64)
        self.key = np.full((batch, k), np.inf, dtype=np.float32)  # smaller is nearer
        self.similarity = np.full((batch, k), np.nan, dtype=np.float32)

    def offer(
        self, row: int, ids: NDArray[np.int64], key: NDArray[np.float32], similarity: NDArray[np.float32]
    ) -> None:
        """Offer references `ids [n]` to a query."""
        nearer = key < self.key[row, -1]  # an equally near one of an earlier offer has the lower number
        ids = np.concatenate([self.index[row], ids[nearer]])
        keys = np.concatenate([self.key[row], key[nearer]])
        values = np.concatenate([self.similarity[row], similarity[nearer]])
        order = np.argsort(keys, kind="stable")[: self.key.shape[1]]
        self.index[row], self.key[row], self.similarity[row] = ids[order], keys[order], values[order]

    def clear(self, row: int) -> None:
        """Forget what a query was offered."""
        self.index[row], self.key[row], self.similarity[row] = -1, np.inf, np.nan

    def drop(self, where: NDArray[np.bool_]) -> None:
        """Forget what stands at `where [B, k]`."""
        self.index[where], self.key[where], self.similarity[where] = -1, np.inf, np.nan


def _cosine(rows: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine `[n]` of unit vectors `[n, D]` and `[D]`; einsum, because BLAS rounds by a row's place in the matrix."""
    return np.clip(np.einsum("nd,d->n", rows, query), -1, 1)


def _part(allowed: NDArray[np.bool_] | None, start: int, count: int) -> NDArray[np.bool_]:
    return np.ones(count, dtype=bool) if allowed is None else allowed[start : start + count]


def _usable(count: int, k: int, allowed: NDArray[np.bool_] | None, max_similarity: float, eps: float | None) -> int:
    """How many references may be found, once the options are checked."""
    if allowed is not None and (allowed.dtype != np.bool_ or allowed.shape != (count,)):
        raise ConfigError(f"allowed must be [{count}] bool, got {list(allowed.shape)} {allowed.dtype}.")
    usable = count if allowed is None else int(allowed.sum())
    if not -1 <= max_similarity <= 1:
        raise ConfigError(f"max_similarity is a cosine, from -1 to 1, got {max_similarity}.")
    if eps is not None and not eps > 0:
        raise ConfigError(f"eps is a distance above 0, got {eps}.")
    if k < 1 or (k > usable and eps is None):
        raise ConfigError(
            f"k must lie between 1 and the number of references that may be found, {usable}; got {k}. "
            "Use fewer neighbours, a larger set, or use='all'."
        )
    return usable
