"""When is an index on disk read, and how does it get there?

FAISS does not defend itself against what it reads. So an index is parsed only where the manifest covers the very
bytes, and names the embeddings that they were built from; anything else is as if it were not there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import faiss

from ttrouting.errors import ArtefactError
from ttrouting.refsets import index as indexes
from ttrouting.refsets.manifest import (
    EMBEDDINGS,
    MANIFEST,
    Manifest,
    inside,
    read_manifest,
    write_file,
    write_manifest,
)


def read_index(folder: Path, manifest: Manifest, kind: str) -> faiss.Index | None:
    """The kept index of a kind, or None where there is none that is covered and of these embeddings."""
    facts = manifest["files"].get(_name(kind))
    if facts is None or facts.get("of") != manifest["files"][EMBEDDINGS]["sha256"]:
        return None
    try:
        data = inside(folder, _name(kind)).read_bytes()
    except (ArtefactError, OSError):
        return None
    return indexes.parse(data) if hashlib.sha256(data).hexdigest() == facts["sha256"] else None


def keep_index(folder: Path, manifest: Manifest, kind: str, index: faiss.Index) -> Manifest:
    """Write an index beside the embeddings; the manifest that covers it.

    A folder that cannot be written keeps none: the index is built again next time.
    """
    data = indexes.dump(index)
    facts: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    facts["of"] = manifest["files"][EMBEDDINGS]["sha256"]
    try:
        write_file(folder / _name(kind), data)
        fresh = read_manifest(folder)  # another process may have added its own
        fresh["files"][_name(kind)] = facts
        write_manifest(folder / MANIFEST, fresh)
    except OSError:
        return manifest
    return fresh


def _name(kind: str) -> str:
    return f"index-{kind}.faiss"
