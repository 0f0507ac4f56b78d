"""What was said, and how is it kept in a file? JSON with a schema version and a hash, no code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttrouting.artefacts import digest
from ttrouting.errors import ArtefactError

SCHEMA = 1
KIND = "ttrouting.chat"


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        user, answer: the texts, without what a template adds.
        stopped: whether the answer was cut short by hand.
        strategies: the options of those that were on, for the reader of a file; loading turns nothing on.
    """

    user: str
    answer: str
    stopped: bool = False
    strategies: tuple[dict[str, Any], ...] = ()


def save(path: Path, turns: Sequence[Turn], model: str) -> None:
    """Write a conversation; one that `save` wrote is replaced.

    Raises:
        ArtefactError: the file holds something else, or cannot be written.
    """
    if path.exists():
        try:
            load(path)
        except ArtefactError:
            raise ArtefactError(f"{path} exists and is no conversation. Choose another name.") from None
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": KIND,
        "model": model,
        "turns": [asdict(turn) for turn in turns],
    }
    content["sha256"] = digest(json.loads(json.dumps(content)))  # of what will be read: lists, not tuples
    draft = path.with_name(f"{path.name}.draft")
    try:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)  # a kill half-way leaves the old file
    except OSError as error:
        raise ArtefactError(f"Cannot write {path}: {error.strerror}. Choose another name.") from None


def load(path: Path) -> tuple[list[Turn], str]:
    """The turns in a file, and the model that they were held with.

    Raises:
        ArtefactError: missing, damaged, changed by hand, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"Cannot read {path}: {error.strerror}. Give a file that /save wrote.") from None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged or no conversation: {error}. Give a file that /save wrote.") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ArtefactError(f"{path} is no conversation. Give a file that /save wrote.")
    if content.get("schema") != SCHEMA:
        raise ArtefactError(
            f"{path} has schema {content.get('schema')!r}, this version reads {SCHEMA}. Save it again."
        )
    if content.get("sha256") != digest(content):
        raise ArtefactError(f"{path} was changed after it was written: its hash does not fit. Save it again.")
    turns, model = content.get("turns"), content.get("model")
    if not isinstance(turns, list) or not isinstance(model, str):
        raise ArtefactError(f"{path} lacks its turns. Save it again.")
    return [_turn(path, one) for one in turns], model


def _turn(path: Path, one: Any) -> Turn:
    kinds = {"user": str, "answer": str, "stopped": bool, "strategies": list}
    if not isinstance(one, dict) or any(not isinstance(one.get(name), kind) for name, kind in kinds.items()):
        raise ArtefactError(f"A turn in {path} lacks a part of it ({', '.join(kinds)}). Save it again.")
    return Turn(one["user"], one["answer"], one["stopped"], tuple(one["strategies"]))
