"""What must a folder's manifest say before anything else in it is read?

A manifest names files by plain names only, with size and sha256, and carries a hash over itself. The hash is no
signature: it finds damage, and forged content still has to pass every check of what it claims.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ttrouting.errors import ArtefactError

SCHEMA = 1
KIND = "reference set"
MANIFEST = "manifest.json"
RECORDS, OFFSETS = "records.jsonl", "offsets.safetensors"
EMBEDDINGS, PATHWAYS = "embeddings.safetensors", "pathways.safetensors"
DATA_FILES = (RECORDS, OFFSETS, EMBEDDINGS, PATHWAYS)
DRAFT = "draft"  # folder of a build that is not finished

Manifest = dict[str, Any]
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA = re.compile(r"[0-9a-f]{64}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a set, with everything in it that `ReferenceSet` reads; no other file is opened.

    Raises:
        ArtefactError: missing, damaged, of another schema, an empty set, or a file name that is not plain.
    """
    file = folder / MANIFEST
    manifest = read_signed(file, KIND, SCHEMA, "Build the set again.")
    if manifest is None:
        raise ArtefactError(_missing(folder))
    lacking = _lacking(manifest)
    if lacking:
        raise ArtefactError(f"{file} lacks {lacking}. Build the set again.")
    if manifest["counts"]["records"] == 0:
        raise ArtefactError(f"{folder} holds no record. Build it again; keep='all' keeps wrong answers too.")
    return manifest


def read_signed(file: Path, kind: str, schema: int, again: str) -> Manifest | None:
    """A JSON object of this kind and schema whose own hash fits, or None where there is no such file.

    Args:
        again: what to do where it cannot be used, for the message.

    Raises:
        ArtefactError: it cannot be read, is damaged, of another kind or schema, or names a file that is not plain.
    """
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ArtefactError(f"Cannot read {file}: {error.strerror}. Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{file} is damaged: {error}. {again}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != schema or manifest.get("kind") != kind:
        told = [manifest.get(k) for k in ("kind", "schema")] if isinstance(manifest, dict) else [None, None]
        raise ArtefactError(
            f"{file} is of kind {told[0]!r} and schema {told[1]!r}; this version reads {kind!r} of schema {schema}. "
            f"{again}"
        )
    if manifest.get("sha256") != digest(manifest):
        raise ArtefactError(f"{file} was changed after it was written: its hash does not fit. {again}")
    files = manifest.get("files")
    for name, facts in files.items() if isinstance(files, dict) else ():
        if not _PLAIN.fullmatch(name):
            raise ArtefactError(f"{file} names {name!r}, which is no plain file in its folder. Do not use it.")
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int:
            raise ArtefactError(f"{file} lacks the size of {name}. {again}")
        if not _SHA.fullmatch(str(facts.get("sha256"))):
            raise ArtefactError(f"{file} lacks the sha256 of {name}. {again}")
    return manifest


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Write a manifest with its own hash; a kill leaves the old file or the new one."""
    whole = {**manifest, "sha256": digest(manifest)}
    write_file(file, (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode())


def digest(manifest: Manifest) -> str:
    """sha256 of everything in a manifest but its own hash."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names.

    Raises:
        ArtefactError: it is not there, no plain file, or a link that leaves the folder.
    """
    file = folder / name
    try:
        stays = file.resolve().is_relative_to(folder.resolve())
    except (RuntimeError, OSError):  # links in a circle
        stays = False
    if not stays:
        raise ArtefactError(f"{file} is a link out of its folder, or to nowhere. Copy the file itself there.")
    if not file.is_file():
        raise ArtefactError(f"{file} is missing, or no file. Build or copy the set again.")
    return file


def check_size(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuse a file that was cut short or grew; its content is not read."""
    file, wanted = inside(folder, name), manifest["files"][name]["bytes"]
    found = file.stat().st_size
    if found != wanted:
        raise ArtefactError(f"{file} has {found} bytes, its manifest says {wanted}. Build or copy the set again.")


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuse a file whose content is not what the manifest says; reads all of it."""
    check_size(folder, manifest, name)
    if sha256_of(inside(folder, name)) != manifest["files"][name]["sha256"]:
        raise ArtefactError(f"{folder / name} was changed: its sha256 is not the manifest's. Build or copy it again.")


def sha256_of(file: Path) -> str:
    """Hash of a file, read in blocks."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ArtefactError(f"Cannot read {file}: {error.strerror}. Check its permissions.") from None


def described(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256_of(file), "bytes": file.stat().st_size}


def write_file(file: Path, data: bytes) -> None:
    """Write beside and move into place, so that a kill never leaves half a file under this name."""
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())  # a machine that stops may otherwise keep the name and lose the content
    part.replace(file)


def _missing(folder: Path) -> str:
    if (folder / DRAFT).is_dir():
        return f"{folder} is not finished. Run the same 'ttrouting refset build' again: it goes on where it stopped."
    return f"{folder} holds no {MANIFEST}. Give a folder that 'ttrouting refset build' wrote."


def _lacking(manifest: Manifest) -> str:
    """The first part that is not there or of another type, or nothing."""
    wanted: dict[str, dict[str, type]] = {
        "embedder": {"name": str, "dimension": int},
        "sites": {"layers": int, "experts": int},
        "counts": {"records": int, "correct": int, "read": int},
        "provenance": {},
        "files": dict.fromkeys(DATA_FILES, dict),
    }
    if not _SHA.fullmatch(str(manifest.get("fingerprint"))):
        return "the fingerprint of its model"
    for part, keys in wanted.items():
        value = manifest.get(part)
        if not isinstance(value, dict):
            return part
        for key, kind in keys.items():
            if type(value.get(key)) is not kind or (kind is int and value[key] < 0):
                return f"{part}.{key}"
    return ""
