"""Save strategies, learned state and traces as data: safetensors and JSON, nothing that could run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.registry import get_strategy
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy
from ttrouting.trace import RoutingTrace

SCHEMA = 1
MANIFEST = "ttrouting.json"
TRACE_FACTS = {"tokens": list, "layers": list, "num_experts": int, "prompt_tokens": int}
# tensor files are named by their content, so that a manifest never meets the tensors of another
OURS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors|\.draft")


Saved = Strategy | Sequence[Strategy] | AdaptationState | RoutingTrace


def save(path: str | os.PathLike[str], what: Saved) -> Path:
    """Write strategies, an adapted model's state, or a trace, into a folder. Replaces what `save` wrote there.

    A kill half-way leaves the old content or the new one, nothing in between.

    Args:
        path: a folder that does not exist yet, or one that `save` wrote.

    Raises:
        ConfigError: something else than strategies, a state or a trace. ArtefactError: the folder holds other things.
    """
    folder = Path(path)
    if folder.exists() and not (folder / MANIFEST).is_file() and not _only_ours(folder):
        raise ArtefactError(f"{folder} exists and was not written by ttr.save. Choose another path.")
    manifest, tensors = _describe(what)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    manifest["tensors"] = hashlib.sha256(data).hexdigest()
    manifest["sha256"] = digest(manifest)
    file = _tensor_file(folder, manifest)
    _write(file, data)
    # from here on the folder is the new artefact
    _write(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for old in folder.iterdir():
        if OURS.fullmatch(old.name) and old != file:
            old.unlink()
    return folder


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` wrote: a list of strategies, an `AdaptationState`, or a `RoutingTrace`.

    Whether strategies or a state belong to a model is checked when they meet one, in `adapt` or `generate`.

    Raises:
        ArtefactError: missing, damaged, cut short, or of another schema.
        ConfigError: it names a strategy or an option that is not installed here, or a value out of range.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    file = _tensor_file(folder, manifest)
    data = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest["tensors"]:
        raise ArtefactError(
            f"{file} does not match its manifest: it is missing, cut short or was changed. Save it again."
        )
    try:
        tensors = safetensors.load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{file} is no safetensors file: {error}. Save it again.") from None
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    if manifest["kind"] == "state":
        return AdaptationState(groups, manifest["fingerprint"])
    if manifest["kind"] == "trace":
        return _trace(file, groups.get("trace", {}), manifest)
    return [
        get_strategy(config["strategy"]).from_dict(config, groups.get(str(number)))
        for number, config in enumerate(manifest["strategies"])
    ]


def _trace(file: Path, arrays: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> RoutingTrace:
    facts = manifest["trace"]
    if "ids" not in arrays:
        raise ArtefactError(f"{file} holds no experts of tokens. Save the trace again.")
    try:
        return RoutingTrace(
            arrays["ids"],
            arrays.get("weights"),
            arrays.get("entropy"),
            tuple(map(str, facts["tokens"])),
            tuple(map(str, facts["layers"])),
            facts["num_experts"],
            facts["prompt_tokens"],
            manifest["fingerprint"],
        )
    except ConfigError as error:
        raise ArtefactError(f"{file} holds no trace: {error}") from None


def _describe(what: Saved) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, still without hashes, and the tensors by `group/name`."""
    if isinstance(what, AdaptationState):
        tensors = {f"{group}/{name}": v for group, values in what.tensors.items() for name, v in values.items()}
        return {"schema": SCHEMA, "kind": "state", "fingerprint": what.fingerprint}, tensors
    if isinstance(what, RoutingTrace):
        arrays = {"ids": what.ids, "weights": what.weights, "entropy": what.entropy}
        facts = {name: getattr(what, name) for name in TRACE_FACTS}
        manifest = {"schema": SCHEMA, "kind": "trace", "fingerprint": what.fingerprint, "trace": facts}
        return manifest, {f"trace/{name}": array for name, array in arrays.items() if array is not None}
    strategies = [what] if isinstance(what, Strategy) else list(what) if isinstance(what, Sequence) else []
    if not strategies or not all(isinstance(s, Strategy) for s in strategies):
        raise ConfigError(f"save takes strategies, an adapted model's state or a trace, got {what!r}.")
    tensors = {f"{number}/{name}": v for number, s in enumerate(strategies) for name, v in s.tensors().items()}
    configs = [s.to_dict() for s in strategies]
    return {"schema": SCHEMA, "kind": "strategies", "strategies": configs}, tensors


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, with everything in it that `load` reads."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError(f"{folder} holds no {MANIFEST}. Give a folder that ttr.save wrote.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{file} is damaged: {error}. Save it again.") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(f"{file} has schema {found!r}, this version reads {SCHEMA}. Save it again.")
    if manifest.get("sha256") != digest(manifest):
        raise ArtefactError(f"{file} was changed after it was written: its hash does not fit. Save it again.")
    kind, configs = manifest.get("kind"), manifest.get("strategies")
    if kind in ("state", "trace"):
        fine = isinstance(manifest.get("fingerprint"), str)
        if kind == "trace":
            told = manifest.get("trace")
            fine &= isinstance(told, dict) and all(isinstance(told.get(n), t) for n, t in TRACE_FACTS.items())
    else:
        named = (isinstance(c, dict) and isinstance(c.get("strategy"), str) for c in configs or ())
        fine = kind == "strategies" and isinstance(configs, list) and all(named)
    if not fine or not re.fullmatch("[0-9a-f]{64}", str(manifest.get("tensors"))):
        raise ArtefactError(f"{file} lacks its content (kind {kind!r}). Save it again.")
    return manifest


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in the manifest but itself."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensor_file(folder: Path, manifest: dict[str, Any]) -> Path:
    return folder / f"tensors-{manifest['tensors'][:16]}.safetensors"


def _only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing, or what a kill during the first `save` left there."""
    return folder.is_dir() and all(OURS.fullmatch(entry.name) for entry in folder.iterdir())


def _write(file: Path, data: bytes) -> None:
    """Write beside and move into place, so that a kill never leaves half a file under this name."""
    draft = file.with_name(".draft")
    draft.write_bytes(data)
    draft.replace(file)
