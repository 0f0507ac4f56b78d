"""Where do the records of a set come from: a JSONL file, a set on the hub, or a list in Python?"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttrouting.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One record as it was found.

    Attributes:
        where: "line 12" of a file, "record 12" of anything else; both count from 1.
        fields: the record, None where it is none. fault: then, why not.
    """

    where: str
    fields: Mapping[str, Any] | None
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """Records that can be read more than once, in the same order.

    Attributes:
        name: for people. sha256: over all of its content. size: how many records it has.
        read: gives the rows from the first one on.
    """

    name: str
    sha256: str
    size: int
    read: Callable[[], Iterator[Row]]


def open_source(
    data: Any, *, subset: str | None = None, split: str | None = None, limit: int | None = None
) -> Source:
    """Find the records and hash them, once through.

    Args:
        data: path of a JSONL file, the name of a set on the hub, or an iterable of mappings that can be read again
            (a list, a `datasets.Dataset`; no generator).
        subset, split: of a set on the hub; the split is "train" by default. limit: only so many records from the
            start.

    Raises:
        ConfigError: no such file or set, no record in it, `datasets` is missing, or options that do not go together.
    """
    if isinstance(data, Path) or (isinstance(data, str) and _is_file(data)):
        if subset is not None or split is not None:
            raise ConfigError(f"{data} is a file: subset and split are for sets on the hub. Leave them out.")
        source = _file(Path(data).expanduser())
    elif isinstance(data, str):
        split = split or "train"
        name = f"{data}{f'/{subset}' if subset else ''} [{split}]"
        source = _iterable(_from_hub(data, subset, split), name, limit)
    elif isinstance(data, Iterable) and not isinstance(data, (Iterator, Mapping)):
        source = _iterable(data, f"{type(data).__name__} in memory", limit)
    else:
        raise ConfigError(
            "Records come from a JSONL file, a set on the hub or an iterable of mappings that can be read twice; "
            f"got a {type(data).__name__}. Make a list of it."
        )
    if source.size == 0:
        raise ConfigError(f"{source.name} holds no record.")
    return source


def _is_file(data: str) -> bool:
    """Whether this can only be a file: names on the hub are `name` or `org/name`, without the end of a file's."""
    file = Path(data).expanduser().is_file()
    return file or data.endswith((".jsonl", ".json")) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", data)


def _file(path: Path) -> Source:
    """A JSONL file; empty lines are no records."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                size += not line.isspace()
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}. Check the path, or name a set on the hub."
        ) from None

    def read() -> Iterator[Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield _parsed(line, f"line {number}")

    return Source(path.name, digest.hexdigest(), size, read)


def _parsed(line: bytes, where: str) -> Row:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(where, None, f"it is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return Row(where, None, f"it is no JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        return Row(where, None, "it is nested too deeply")
    return _row(fields, where)


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, Mapping):
        return Row(where, None, f"it is a {type(fields).__name__}, not an object with fields")
    return Row(where, fields)


def _iterable(rows: Iterable[Any], name: str, limit: int | None) -> Source:
    def read() -> Iterator[Row]:
        for number, fields in enumerate(itertools.islice(rows, limit), 1):
            yield _row(fields, f"record {number}")

    digest, size = hashlib.sha256(), 0
    for row in read():
        fields = None if row.fields is None else dict(row.fields)
        digest.update(json.dumps(fields, default=_plain, skipkeys=True).encode() + b"\n")
        size += 1
    return Source(name, digest.hexdigest(), size, read)


def _plain(value: Any) -> Any:
    """What JSON has no word for, in a way that is the same in every process."""
    return value.item() if isinstance(value, np.generic) else f"a {type(value).__name__}"


def _from_hub(name: str, subset: str | None, split: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"There is no file {name}. Reading {name!r} from the hub needs the package datasets ({error}): "
            "pip install 'datasets>=4', or give a JSONL file."
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ConfigError(
            f"datasets {datasets.__version__} may run code that comes with a set. Update it: "
            "pip install 'datasets>=4'."
        )
    try:
        found: Iterable[Any] = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"Cannot load {name!r} ({split}) from the hub: {reason}. Check the name, --subset, --split and the "
            "connection, or give a JSONL file."
        ) from None
    return found
