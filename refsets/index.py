"""How are near vectors found fast? FAISS indexes over unit vectors by inner product: flat, HNSW or IVF-PQ.

An index proposes candidates; `neighbours.find` measures them again on the stored vectors, so an approximate
index may miss a neighbour but never reports a wrong similarity.

Legend: `B` queries, `N` vectors, `D` dimension, `k` candidates for each query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ArtefactError, ConfigError, did_you_mean
from ttrouting.refsets.vectors import CHUNK, Floats, Vectors

KINDS = ("flat", "hnsw", "ivfpq")
# measured in docs/refsets.md
FLAT_UP_TO = 100_000
HNSW_UP_TO = 500_000

CANDIDATES = 64  # proposed at least, to be measured again
CANDIDATES_BY_CODE = 256  # the same where the index knows vectors by their PQ codes only
LINKS = 32  # HNSW: neighbours of each node and level
BUILD_EFFORT = 40  # HNSW: candidates looked at while a node is linked
SEARCH_EFFORT = 128  # HNSW: candidates looked at in a search, at least
LISTS_PER_ROOT = 4  # IVF: 4 sqrt(N) lists
LISTS_READ = 1 / 8  # IVF: share of the lists that a search reads
CODE_DIMENSIONS = 8  # PQ: dimensions in one byte; FAISS trains 4 seven times slower
TRAINING_ROWS = 39 * 256  # what FAISS asks for at least, for 256 centroids
LEAST_PER_LIST = 39  # IVF: vectors for each list, below which FAISS calls lists too many
TRAINING_ROUNDS = 10  # of k-means


def kind_for(count: int) -> str:
    """The kind of index for so many vectors."""
    return "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"


def build(vectors: Vectors | Floats, kind: str) -> faiss.Index:
    """An index over unit vectors. The same vectors give the same index, byte for byte.

    Args:
        vectors: `[N, D]`, read in chunks. kind: "flat", "hnsw" or "ivfpq".

    Raises:
        ConfigError: an unknown kind, or too few vectors to train IVF-PQ on.
    """
    count, width = len(vectors), _width(vectors)
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        # halves for the storage: similarities are measured again on the stored vectors anyway
        index = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
    elif kind == "ivfpq":
        index = _ivfpq(count, width)
    else:
        raise ConfigError(f"No index of the kind {kind!r}.{did_you_mean(kind, KINDS)}")
    with _one_thread():
        if not index.is_trained:
            index.train(_padded(_sample(vectors, max(TRAINING_ROWS, LEAST_PER_LIST * index.nlist)), index.d))
        for start in range(0, count, CHUNK):
            index.add(_padded(vectors[start : start + CHUNK], index.d))
    return index


def dump(index: faiss.Index) -> bytes:
    """An index as bytes for a file."""
    return faiss.serialize_index(index).tobytes()


def parse(data: bytes) -> faiss.Index:
    """The index that `dump` wrote. Only for bytes whose hash a manifest covers: FAISS does not defend itself.

    Raises:
        ArtefactError: no index.
    """
    try:
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2]
        raise ArtefactError(f"These {len(data)} bytes are no FAISS index: {reason}. Build the index again.") from None


def search(
    index: faiss.Index, queries: Floats, k: int, allowed: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k candidates that the index holds for nearest, best first.

    Args:
        queries: `[B, D]` unit vectors. allowed: `[N]`, which vectors may be found; None: all.

    Returns:
        Similarity `[B, k]` as the index estimates it and ids `[B, k]`, -1 where it found no more.
    """
    selector: dict[str, Any] = {}
    if allowed is not None:
        selector["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if isinstance(index, faiss.IndexHNSW):
        parameters = faiss.SearchParametersHNSW(efSearch=max(SEARCH_EFFORT, k), **selector)
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=math.ceil(index.nlist * LISTS_READ), **selector)
    else:
        parameters = faiss.SearchParameters(**selector)
    similarity, ids = index.search(_padded(queries, index.d), k, params=parameters)
    return similarity, ids


def candidates(index: faiss.Index, k: int) -> int:
    """How many candidates to ask of an index so that the k nearest are among them."""
    return max(2 * k, CANDIDATES_BY_CODE if isinstance(index, faiss.IndexIVF) else CANDIDATES)


def _ivfpq(count: int, width: int) -> faiss.IndexIVFPQ:
    if count < TRAINING_ROWS:
        raise ConfigError(
            f"IVF-PQ is trained on at least {TRAINING_ROWS} vectors, there are {count}. Use 'flat' or 'hnsw'."
        )
    lists = min(int(LISTS_PER_ROOT * math.sqrt(count)), count // LEAST_PER_LIST)
    codes = math.ceil(width / CODE_DIMENSIONS)
    coarse = faiss.IndexFlatIP(codes * CODE_DIMENSIONS)
    index = faiss.IndexIVFPQ(coarse, coarse.d, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True  # unit centroids for inner products
    index.cp.niter = index.pq.cp.niter = TRAINING_ROUNDS
    return index


def _sample(vectors: Vectors | Floats, rows: int) -> NDArray[np.float32]:
    """A fixed sample, spread evenly: `[rows, D]`, or everything where there is less."""
    count = len(vectors)
    chosen = np.unique(np.linspace(0, count - 1, min(rows, count)).astype(np.int64))
    return np.asarray(vectors[chosen], dtype=np.float32)


def _width(vectors: Vectors | Floats) -> int:
    return vectors.dimension if isinstance(vectors, Vectors) else int(vectors.shape[1])


def _padded(rows: Floats, width: int) -> NDArray[np.float32]:
    """Rows with zeros up to what PQ can cut into equal parts; inner products stay the same."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    return rows if rows.shape[1] == width else np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS on one thread: with more, HNSW links nodes in an order that differs from run to run."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
