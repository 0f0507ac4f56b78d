"""Save strategies and learned state as data: safetensors and JSON, nothing that could run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.registry import get_strategy
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy

SCHEMA = 1
MANIFEST, TENSORS = "ttrouting.json", "tensors.safetensors"


def save(path: str | os.PathLike[str], what: Strategy | Sequence[Strategy] | AdaptationState) -> Path:
    """Write strategies, or the state of an adapted model, into a folder. Replaces an earlier one whole.

    Args:
        path: a folder that does not exist yet, or one that `save` wrote.

    Raises:
        ConfigError: something else than strategies or a state. ArtefactError: the folder holds other things.
    """
    folder = Path(path)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ArtefactError(f"{folder} exists and was not written by ttr.save. Choose another path.")
    manifest: dict[str, Any] = {"schema": SCHEMA}
    tensors: dict[str, Tensor] = {}
    if isinstance(what, AdaptationState):
        manifest |= {"kind": "state", "fingerprint": what.fingerprint}
        for group, values in what.tensors.items():
            tensors |= {f"{group}/{name}": value for name, value in values.items()}
    else:
        strategies = [what] if isinstance(what, Strategy) else list(what)
        if not strategies or not all(isinstance(s, Strategy) for s in strategies):
            raise ConfigError(f"save takes strategies or an adapted model's state, got {what!r}.")
        manifest |= {"kind": "strategies", "strategies": [s.to_dict() for s in strategies]}
        for number, strategy in enumerate(strategies):
            tensors |= {f"{number}/{name}": value for name, value in strategy.tensors().items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside its place and moved there whole: a kill leaves the old folder or the new one
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, draft / TENSORS)
        manifest["sha256"] = _sha256(draft / TENSORS)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` wrote: a list of strategies, or an `AdaptationState`.

    Whether it belongs to a model is checked when it meets one, in `adapt` or `generate`.

    Raises:
        ArtefactError: missing, damaged, cut short, or of another schema.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    file = folder / TENSORS
    if not file.is_file() or _sha256(file) != manifest.get("sha256"):
        raise ArtefactError(
            f"{file} does not match its manifest: it is missing, cut short or was changed. Save it again."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ArtefactError(f"{file} is no safetensors file: {error}.") from None
    if manifest["kind"] == "state":
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value
        return AdaptationState(groups, manifest["fingerprint"])
    found = []
    for number, config in enumerate(manifest["strategies"]):
        own = {k.partition("/")[2]: v for k, v in tensors.items() if k.partition("/")[0] == str(number)}
        found.append(get_strategy(config["strategy"]).from_dict(config, own))
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise ArtefactError(f"{folder} holds no {MANIFEST}. Give a folder that ttr.save wrote.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{file} is damaged: {error}.") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(f"{file} has schema {found!r}, this version reads {SCHEMA}. Save it again.")
    needed = {"state": ("fingerprint",), "strategies": ("strategies",)}.get(manifest.get("kind", ""))
    if needed is None or any(key not in manifest for key in needed):
        raise ArtefactError(f"{file} lacks its content (kind {manifest.get('kind')!r}). Save it again.")
    return manifest


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
