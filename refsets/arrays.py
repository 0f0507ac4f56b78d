"""How are arrays streamed into a safetensors file, and mapped from one without reading it?

The library reads and writes whole tensors; a set of a million records is written row by row and opened by its header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ArtefactError

Array = NDArray[Any]
Shape = tuple[int, ...]

TYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8", "U8": "|u1"}  # safetensors' names of numpy's types
LONGEST_HEADER = 1 << 20  # bytes; ours have some hundred


def write_header(file: BinaryIO, arrays: Mapping[str, tuple[str, Shape]]) -> dict[str, int]:
    """Begin a safetensors file: name -> (type, shape), in the order of their data.

    Returns:
        Where the data of each array begins in the file. All of it is to be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in arrays.items():
        begin, end = end, end + math.prod(shape) * np.dtype(TYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in arrays}


@dataclass(frozen=True)
class _Entry:
    kind: str
    shape: Shape
    begin: int  # byte of the file


class ArrayFile:
    """A safetensors file of which only the header is read.

    Args:
        path: the file. arrays: name -> (type, number of dimensions) of what must be in it, and nothing else.

    Raises:
        ArtefactError: no such file, no safetensors, cut short, or other arrays.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple[str, int]]) -> None:
        self.path = path
        self._entries = _read_header(path)
        found = {name: (entry.kind, len(entry.shape)) for name, entry in self._entries.items()}
        if found != dict(arrays):
            raise ArtefactError(
                f"{path} should hold {_told(arrays)}, and holds {_told(found)}. It was not written by this version; "
                "build the set again."
            )

    def shape(self, name: str) -> Shape:
        return self._entries[name].shape

    def map(self, name: str) -> Array:
        """An array as a read-only memory map; pages are read when they are touched."""
        entry = self._entries[name]
        if 0 in entry.shape:
            return np.zeros(entry.shape, TYPES[entry.kind])
        return np.memmap(self.path, TYPES[entry.kind], "r", entry.begin, entry.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of an array, read into memory."""
        entry = self._entries[name]
        kind, row = np.dtype(TYPES[entry.kind]), entry.shape[1:]
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        width = math.prod(row)
        values = np.fromfile(
            self.path, kind, (stop - start) * width, offset=entry.begin + start * width * kind.itemsize
        )
        return values.reshape(stop - start, *row)


def _told(arrays: Mapping[str, tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({kind}, {axes}-d)" for name, (kind, axes) in sorted(arrays.items())) or "nothing"


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header cannot have {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        return _entries(header, 8 + length, size)
    except OSError as error:
        raise ArtefactError(f"Cannot read {path}: {error.strerror}. Build or copy the set again.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ArtefactError(f"{path} is no safetensors file, or was cut short: {reason}. Build it again.") from None


def _entries(header: Any, begin: int, size: int) -> dict[str, _Entry]:
    """The arrays of a header whose data begins at `begin`; they must fill the file without a gap."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    found: dict[str, _Entry] = {}
    end = begin
    for name, facts in sorted(
        ((n, f) for n, f in header.items() if n != "__metadata__"), key=lambda item: item[1]["data_offsets"]
    ):
        shape, kind = facts["shape"], facts["dtype"]
        if kind not in TYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} has type {kind!r} and shape {shape}")
        found[name] = _Entry(kind, tuple(shape), end)
        after = end + math.prod(shape) * np.dtype(TYPES[kind]).itemsize
        if facts["data_offsets"] != [end - begin, after - begin]:
            raise ValueError(f"{name} stands at {facts['data_offsets']} instead of [{end - begin}, {after - begin}]")
        end = after
    if end != size:
        raise ValueError(f"it has {size} bytes instead of {end}")
    return found
