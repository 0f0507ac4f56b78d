"""How are dropped pairs skipped where shapes must be static: on a GPU, and in a compiled graph?

Legend: `N` tokens, `H` hidden size, `E` experts, `K` columns, `S = N K` pairs, `I` an expert's inner size.
transformers' grouped matmul, with the dropped pairs sorted behind the last group, where no matmul reads. With
nothing dropped it computes what `grouped_mm` does, to the bit. Has not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear


def grouped_forward(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`[N, H]`; arguments as in `ragged_experts_forward`."""
    (tokens, columns), experts = ids.shape, self.num_experts
    kept = (weights != 0) & (ids < experts)
    # behind every real id
    keys, order = torch.sort(ids.masked_fill(~kept, experts).reshape(-1))  # [S]
    dropped = (keys >= experts)[:, None]
    # `histc`, as bincount's length depends on data; integers are not supported on every device
    wide = keys.float() if keys.device.type in ("cpu", "mps") else keys.int()
    rows = torch.histc(wide, bins=experts, min=0, max=experts - 1)
    ends = torch.cumsum(rows, 0, dtype=torch.int32)  # [E]
    owner = keys.clamp_max(experts - 1)
    # zeros, since nobody writes the gradient of rows behind the last group
    inputs = hidden[order // columns].masked_fill(dropped, 0)  # [S, H]
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _linear(self, name, inputs, ends, owner).masked_fill(dropped, 0)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # [S, I]
    made = _linear(self, "down_proj", inner, ends, owner).masked_fill(dropped, 0)  # [S, H]
    weighted = made * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    # gather and sum: adding in place is not deterministic on a GPU
    return weighted[back].view(tokens, columns, -1).sum(1).to(hidden.dtype)


def _linear(self: Any, name: str, rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    """`rows [S, in]` through the matrix of each row's expert, `[S, out]`; rows past `ends[-1]` are undefined."""
    weight: Tensor = getattr(self, name)
    bias = getattr(self, f"{name}_bias")[owner] if self.has_bias else None
    if weight.dtype == torch.float64:  # grouped matmul takes no fp64
        matrix = weight if self.is_transposed else weight.transpose(-2, -1)
        out = torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), matrix, ends)
        return out if bias is None else out + bias
    return _grouped_linear(rows, weight, ends, bias=bias, is_transposed=self.is_transposed)
