"""Repeat a model's inputs for several streams of the same sequences, and take the first one back out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# one-dimensional or layout-free inputs that all rows share
SHARED = ("cache_position", "logits_to_keep")


def _repeat(value: Tensor, batch: int, streams: int) -> Tensor:
    # multi-axis rotary positions are [axes, B, S]
    dim = 1 if value.dim() == 3 and value.shape[0] != batch and value.shape[1] == batch else 0
    return torch.cat([value] * streams, dim)


def repeat_inputs(kwargs: dict[str, Any], batch: int, streams: int) -> dict[str, Any]:
    """Model inputs for `batch` rows -> for `streams * batch` rows, the streams one after the other."""
    repeated: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() and name not in SHARED:
            # positions without a batch row, [1, S], broadcast over any batch
            if value.shape[0] == 1 and batch > 1 and name == "position_ids":
                repeated[name] = value
            else:
                repeated[name] = _repeat(value, batch, streams)
        elif isinstance(value, dict):
            repeated[name] = {k: _repeat(v, batch, streams) if isinstance(v, Tensor) else v for k, v in value.items()}
        else:
            repeated[name] = value
    return repeated


def first_stream(output: Any, rows: int, batch: int) -> Any:
    """Cut every per-row tensor of a model output from `rows` to its first `batch` rows.

    Per-token tensors, `[rows * S, ...]` such as router logits, keep the same share.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] % rows == 0:
            return value[: value.shape[0] // rows * batch]
        if isinstance(value, Tensor):
            return value
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        return value

    for name, value in list(output.items()):
        if name != "past_key_values":
            output[name] = cut(value)
    return output
