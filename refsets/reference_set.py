"""What can be asked of a reference set? Its records, how they were routed, and which are near a question.

    refset = ReferenceSet.open("sets/train")
    found = refset.search(embeddings, k=3)  # raw embeddings of B questions
    refset.record(found.index[0, 0]), refset.omega(found.index[0])

Legend: `N` records, `B` queries, `D` embedding dimension, `L` MoE layers, `E` experts, `k` neighbours.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ttrouting.errors import ArtefactError, ConfigError, did_you_mean
from ttrouting.refsets import index as indexes
from ttrouting.refsets.arrays import ArrayFile
from ttrouting.refsets.checks import check_embeddings, open_arrays
from ttrouting.refsets.index_files import keep_index, read_index
from ttrouting.refsets.manifest import (
    DATA_FILES,
    EMBEDDINGS,
    OFFSETS,
    PATHWAYS,
    RECORDS,
    Manifest,
    check_hash,
    digest,
    inside,
    read_manifest,
)
from ttrouting.refsets.neighbours import LEAKAGE, Neighbours, find, find_pathways
from ttrouting.refsets.records import Record
from ttrouting.refsets.vectors import Floats, Vectors

USES = ("successful", "all")


class ReferenceSet:
    """A set in its folder, memory-mapped. Made by `open`.

    Opening looks at the manifest, at the sizes of files and at their headers, nothing else. The first use of a file
    hashes it, once.

    Attributes:
        path: the folder. manifest: what its manifest says.
    """

    def __init__(self, path: Path, manifest: Manifest, arrays: dict[str, ArrayFile]) -> None:
        self.path = path
        self.manifest = manifest
        self._arrays = arrays
        self._hashed: set[str] = set()
        self._indexes: dict[str, faiss.Index] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ReferenceSet:
        """Open a finished set.

        Raises:
            ArtefactError: missing, unfinished, damaged, cut short, of another schema, or empty; the text says which.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        return cls(folder, manifest, open_arrays(folder, manifest))

    def __len__(self) -> int:
        return int(self.manifest["counts"]["records"])

    def __repr__(self) -> str:
        return f"ReferenceSet({str(self.path)!r}, {len(self)} records, embedder {self.embedder_name!r})"

    @property
    def fingerprint(self) -> str:
        """Of the model that the set was built with."""
        return str(self.manifest["fingerprint"])

    @property
    def identity(self) -> str:
        """sha256 over the files of data: of what is in the set, wherever it stands and whatever indexes are kept."""
        files = self.manifest["files"]
        return digest({name: files[name]["sha256"] for name in DATA_FILES})

    @property
    def embedder_name(self) -> str:
        """`"model"`, or the name of another embedder."""
        return str(self.manifest["embedder"]["name"])

    @property
    def dimension(self) -> int:
        """`D`"""
        return int(self.manifest["embedder"]["dimension"])

    @property
    def layers(self) -> int:
        """`L`"""
        return int(self.manifest["sites"]["layers"])

    @property
    def experts(self) -> int:
        """`E`, of the layer that has most."""
        return int(self.manifest["sites"]["experts"])

    # --- content ------------------------------------------------------------------------------------

    def record(self, number: int) -> Record:
        """One record; `number` counts from 0."""
        number = int(number)
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        file = self._used(RECORDS)
        begin, end = (int(offset) for offset in self._offsets[number : number + 2])
        where = f"Record {number} of {file}"
        if not 0 <= begin <= end <= self.manifest["files"][RECORDS]["bytes"]:
            raise ArtefactError(f"{where} cannot stand from byte {begin} to {end}. Build the set again.")
        with file.open("rb") as opened:
            opened.seek(begin)
            return Record.parse(opened.read(end - begin), where)

    def embeddings(self) -> NDArray[np.float16]:
        """`[N, D]` fp16 unit vectors, memory-mapped."""
        return self._vectors.rows

    def omega(self, numbers: ArrayLike) -> NDArray[np.float32]:
        """Pathways `[n, L, E]` fp32 of some records: the family's scores before bias at the last prompt token."""
        chosen = np.asarray(numbers, dtype=np.int64).reshape(-1)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"records {chosen.tolist()} of {len(self)}")
        found = self._omega[chosen].astype(np.float32)
        if not np.isfinite(found).all():
            raise ArtefactError(f"{self.path / PATHWAYS} holds scores that are not finite. Build the set again.")
        return found

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """`[N]` whether the model answers each record correctly."""
        self._used(OFFSETS)
        return self._arrays[OFFSETS].read("correct").astype(np.bool_)

    # --- checks -------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ArtefactError: the first file that is missing or is not what the manifest says.
        """
        for name in self.manifest["files"]:
            check_hash(self.path, self.manifest, name)
            self._hashed.add(name)

    def check_model(self, fingerprint: str) -> None:
        """Refuse another model than the one that the set was built with.

        Raises:
            ArtefactError: with the beginnings of both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise ArtefactError(
                f"{self.path} was built with {self.manifest.get('model')!r} (fingerprint {self.fingerprint[:12]}), "
                f"this model's is {fingerprint[:12]}: its pathways mean nothing here. Build a set with this model."
            )

    # --- search -------------------------------------------------------------------------------------

    def compared(self, raw: Floats) -> NDArray[np.float32]:
        """Raw embeddings `[B, D]` as the vectors that are compared: unit length, centred where the model embeds.

        Raises:
            ConfigError: another dimension, a number that is not finite, a zero vector.
        """
        return self._vectors.query(raw)

    def vectors(self, numbers: ArrayLike) -> NDArray[np.float32]:
        """`[n, D]`, those of references."""
        return self._vectors[np.asarray(numbers, dtype=np.int64)]

    def search(
        self,
        query: Floats,
        k: int,
        *,
        use: str = "successful",
        max_similarity: float = LEAKAGE,
        eps: float | None = None,
        index: str = "auto",
    ) -> Neighbours:
        """The references whose embeddings are nearest to those of some questions.

        Args:
            query: `[B, D]` raw embeddings, from the embedder of the set. k: how many neighbours.
            use: "successful" references, or "all" where wrongly answered ones were kept.
            max_similarity, eps: as in `ttrouting.refsets.neighbours.find`.
            index: "flat", "hnsw", "ivfpq", or "auto" by size. The latter two are kept beside the embeddings.

        Raises:
            ConfigError: an option is out of range, or fewer than k references can be found.
            ArtefactError: a file was changed.
        """
        allowed = self._allowed(use)
        queries = self.compared(query)
        return find(
            self._vectors,
            queries,
            k,
            index=self._index(index),
            allowed=allowed,
            max_similarity=max_similarity,
            eps=eps,
        )

    def near_pathways(
        self,
        query_omega: Floats,
        layers: list[int],
        k: int,
        *,
        use: str = "successful",
        exclude_similar_to: Floats | None = None,
        max_similarity: float = LEAKAGE,
    ) -> Neighbours:
        """The references that were routed most like some questions, by Euclidean distance at some layers.

        Args:
            query_omega: `[B, len(layers), E]` scores before bias. layers: which of the L layers these are.
            k, use: as in `search`. exclude_similar_to: `[B, D]` raw embeddings of the questions; references above
                `max_similarity` to them are dropped as leakage. None drops nothing.

        Raises:
            As `search`.
        """
        embedded = None if exclude_similar_to is None else self._vectors.query(exclude_similar_to)
        return find_pathways(
            self._omega,
            query_omega,
            layers,
            k,
            allowed=self._allowed(use),
            vectors=None if embedded is None else self._vectors,
            embedded=embedded,
            max_similarity=max_similarity,
        )

    def _allowed(self, use: str) -> NDArray[np.bool_] | None:
        if use not in USES:
            raise ConfigError(f"use cannot be {use!r}.{did_you_mean(str(use), USES)}")
        return None if use == "all" or bool(self.correct.all()) else self.correct

    def _index(self, kind: str) -> faiss.Index:
        """The index of a kind, from memory, from its file, or built and then kept."""
        kind = indexes.kind_for(len(self)) if kind == "auto" else kind
        if kind not in self._indexes:
            kept = kind != "flat"  # a flat one is the embeddings once more
            found = read_index(self.path, self.manifest, kind) if kept else None
            if found is None:
                found = indexes.build(self._vectors, kind)
                if kept:
                    self.manifest = keep_index(self.path, self.manifest, kind, found)
            self._indexes[kind] = found
        return self._indexes[kind]

    # --- files --------------------------------------------------------------------------------------

    def _used(self, name: str) -> Path:
        """The path of a file, hashed before its first use."""
        if name not in self._hashed:
            check_hash(self.path, self.manifest, name)
            self._hashed.add(name)
        return inside(self.path, name)

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        self._used(OFFSETS)
        return self._arrays[OFFSETS].map("offsets")

    @cached_property
    def _vectors(self) -> Vectors:
        self._used(EMBEDDINGS)
        arrays = self._arrays[EMBEDDINGS]
        check_embeddings(arrays)
        centre = (arrays.read(name) for name in ("mean", "scale")) if self.embedder_name == "model" else (None, None)
        return Vectors(arrays.map("embeddings"), *centre)

    @cached_property
    def _omega(self) -> NDArray[np.float16]:
        self._used(PATHWAYS)
        return self._arrays[PATHWAYS].map("omega")
