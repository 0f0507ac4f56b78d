"""What does searching a large reference set cost, and what does an approximate index miss?

For each size and each kind of index: time to build, time of a search, recall against exact search, memory.
A search is what a reference set does: candidates from the index, measured again on the stored fp16 vectors.

    python demos/refset_scale.py --sizes 10000 100000 1000000 --out scale.json

Vectors are made: 5000 centres, the k-th drawn in proportion to 1/sqrt(k); around each, normal noise of 0.8 times the
centres' own spread; dimension i of both has a standard deviation of 1/sqrt(i). At 10,000 a query's nearest, 10th and
64th reference have median cosines of 0.65, 0.45 and 0.38; for 14,000 questions embedded by all-MiniLM-L6-v2 these are
0.68, 0.53 and 0.41. With `--embeddings FILE.safetensors` (a tensor "embeddings") they are made from real ones: a row
plus the difference between another row and its nearest neighbour; queries are rows that are held out.
"""

import argparse
import json
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import load_file

from ttrouting.refsets import index as indexes
from ttrouting.refsets.neighbours import find
from ttrouting.refsets.vectors import CHUNK, Vectors, unit

CENTRES = 5000
NOISE = 0.8
FEWEST, DEEPEST = 4, 10  # neighbours; times are of the former, recall is given for both


class Mixture:
    """Made vectors: clusters of unequal size in a space of unequal directions."""

    def __init__(self, dimension: int) -> None:
        self.spread = 1 / np.sqrt(np.arange(1, dimension + 1))
        self.centres = np.random.default_rng(0).normal(size=(CENTRES, dimension)) * self.spread
        share = 1 / np.sqrt(np.arange(1, CENTRES + 1))
        self.share = share / share.sum()

    def references(self, count: int, noise: np.random.Generator) -> np.ndarray:
        chosen = noise.choice(CENTRES, p=self.share, size=count)
        return unit(self.centres[chosen] + NOISE * noise.normal(size=(count, len(self.spread))) * self.spread)

    queries = references


class Resampled:
    """Real vectors, multiplied: a row plus the step from another row to its nearest neighbour."""

    def __init__(self, file: Path, held_out: int) -> None:
        rows = unit(load_file(file)["embeddings"])
        np.random.default_rng(0).shuffle(rows)
        self.asked, self.rows = rows[:held_out], rows[held_out:]
        similarity = self.rows @ self.rows.T
        np.fill_diagonal(similarity, -1)
        self.steps = self.rows[similarity.argmax(1)] - self.rows

    def references(self, count: int, noise: np.random.Generator) -> np.ndarray:
        row, step = noise.integers(len(self.rows), size=(2, count))
        return unit(self.rows[row] + self.steps[step])

    def queries(self, count: int, _noise: np.random.Generator) -> np.ndarray:
        return self.asked[:count]


class Stored(Vectors):
    """References as a set keeps them: fp16 on disk, mapped anew in each process."""

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        super().__init__(np.memmap(file, dtype=np.float16, mode="r", shape=shape))
        self.where = file, shape

    def __reduce__(self) -> tuple[type["Stored"], tuple[Path, tuple[int, int]]]:
        return Stored, self.where


def stored(source: Mixture | Resampled, count: int, folder: Path) -> Stored:
    """Make references and write them."""
    noise = np.random.default_rng(1)
    first = source.references(min(count, CHUNK), noise)
    rows = np.memmap(folder / f"{count}.f16", dtype=np.float16, mode="w+", shape=(count, first.shape[1]))
    rows[: len(first)] = first
    for start in range(len(first), count, CHUNK):
        stop = min(start + CHUNK, count)
        rows[start:stop] = source.references(stop - start, noise)
    rows.flush()
    return Stored(folder / f"{count}.f16", (count, rows.shape[1]))


def own_memory() -> int:
    """Bytes that this process holds, mapped files left out; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def measure(kind: str, vectors: Vectors, queries: np.ndarray, args: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """A row of the table, and what was found, by k. Runs in a process of its own, so that memory is its own."""
    faiss.omp_set_num_threads(args.threads)
    clock = process_time if args.clock == "cpu" else perf_counter
    before = own_memory()
    began = clock()
    index = indexes.build(vectors, kind)
    built = clock() - began
    grown = own_memory() - before
    search = partial(find, vectors, index=index, max_similarity=1)
    single, batched = [], []
    for start in range(len(queries)):
        began = clock()
        search(queries[start : start + 1], FEWEST)
        single.append(1000 * (clock() - began))
    for start in range(0, len(queries) - args.batch + 1, args.batch):
        began = clock()
        search(queries[start : start + args.batch], FEWEST)
        batched.append(1000 * (clock() - began) / args.batch)
    low, *_, high = statistics.quantiles(single, n=20)
    row = {
        "vectors": len(vectors),
        "index": kind,
        "build_s": built,
        "query_ms": statistics.median(single),
        "query_ms_5": low,
        "query_ms_95": high,
        "batched_ms": statistics.median(batched),
        "file_mb": len(indexes.dump(index)) / 1e6,
        "memory_mb": grown / 1e6,
    }
    return row, {k: search(queries, k).index for k in (FEWEST, DEEPEST)}


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)]))


def line(row: dict[str, Any]) -> str:
    return (
        "| {vectors:,} | {index} | {build_s:,.1f} | {query_ms:.2f} ({query_ms_5:.2f} to {query_ms_95:.2f}) | "
        "{batched_ms:.2f} | {recall_4:.3f} | {recall_10:.3f} | {file_mb:,.0f} | {memory_mb:,.0f} |"
    ).format(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dimension", type=int, default=384, help="of the made vectors")
    parser.add_argument("--kinds", nargs="+", choices=indexes.KINDS, default=list(indexes.KINDS), help="beside flat")
    parser.add_argument("--queries", type=int, default=320)
    parser.add_argument("--batch", type=int, default=32, help="queries in one call, for the batched time")
    parser.add_argument("--threads", type=int, default=1, help="of FAISS")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: where others work; 1 thread")
    parser.add_argument(
        "--embeddings", type=Path, help="safetensors file of real embeddings to make the vectors from"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    settings = {**vars(args), "faiss": faiss.__version__, "numpy": np.__version__, "machine": platform.platform()}
    source = Resampled(args.embeddings, args.queries) if args.embeddings else Mixture(args.dimension)
    kinds = ["flat", *(kind for kind in args.kinds if kind != "flat")]  # recall is measured against flat
    rows: list[dict[str, Any]] = []
    print("| vectors | index | build, s | one query, ms (5 to 95 %) | in batches, ms a query ", end="")
    print(f"| recall@{FEWEST} | recall@{DEEPEST} | file, MB | memory, MB |\n|{'---|' * 9}")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            vectors = stored(source, size, Path(folder))
            queries = vectors.query(source.queries(args.queries, np.random.default_rng(2)))
            truth: dict[int, np.ndarray] = {}
            for kind in kinds:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
                    row, found = apart.submit(measure, kind, vectors, queries, args).result()
                truth = truth or found
                row |= {f"recall_{k}": recall(found[k], truth[k]) for k in found}
                print(line(row), flush=True)
                rows.append(row)
                if args.out:
                    args.out.write_text(
                        json.dumps({"settings": settings, "rows": rows}, indent=1, default=str) + "\n"
                    )


if __name__ == "__main__":
    main()
