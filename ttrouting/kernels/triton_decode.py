"""How does a GPU decode while it reads only the experts that are kept? One Triton kernel, run twice.

Legend: `N` tokens, `H` hidden size, `E` experts, `K` columns, `P = N K` pairs, `I` an expert's inner size.
Each program multiplies one pair's vector with a block of its expert's rows; a dropped pair reads nothing and writes
zeros. Shapes depend on `N` and `K` alone and nothing waits for the device, so calls can be captured in a CUDA graph.
Each pair writes its own row and a sum over `K` follows: no atomics, the same bits every time. Sums are in fp32.
Without a gradient: `ragged.py` calls it where none is asked for. Checked with Triton's interpreter only; HAS NOT
RUN ON A GPU YET, and its block sizes are untuned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

# Along the contiguous axis of the weights a block is long, for wide loads.
LONG, SHORT = 256, 8


@triton.jit  # type: ignore[untyped-decorator]
def _pair_linear(  # type: ignore[no-untyped-def]
    rows,  # [N or P, IN]
    matrices,  # [E, OUT, IN] in any layout; OUT is 2 INNER where gated
    biases,  # [E, OUT]
    ids,  # [P]
    weights,  # [P]
    out,  # [P, OUT], or [P, INNER] where gated
    PAIRS_PER_ROW: tl.constexpr,
    EXPERTS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    expert_stride,
    out_stride,
    in_stride,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # out = silu(first half) * second half
    SCALED: tl.constexpr,  # out is multiplied with the pair's weight
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
    target = out + pair * OUT + own
    inside = own < OUT
    expert = tl.load(ids + pair).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    if (weight == 0) | (expert >= EXPERTS):
        tl.store(target, tl.zeros([BLOCK_OUT], dtype=out.dtype.element_ty), mask=inside)
        return
    matrix = matrices + expert * expert_stride + own.to(tl.int64)[:, None] * out_stride
    vector = rows + (pair // PAIRS_PER_ROW) * IN
    first = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    second = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    for begin in range(0, IN, BLOCK_IN):
        along = begin + tl.arange(0, BLOCK_IN)  # [BLOCK_IN]
        mask = inside[:, None] & (along < IN)[None, :]
        x = tl.load(vector + along, mask=along < IN, other=0).to(tl.float32)[None, :]
        first += x * tl.load(matrix + along[None, :] * in_stride, mask=mask, other=0).to(tl.float32)
        if GATED:
            half = matrix + OUT * out_stride
            second += x * tl.load(half + along[None, :] * in_stride, mask=mask, other=0).to(tl.float32)
    result = tl.sum(first, 1)
    if HAS_BIAS:
        bias = biases + expert * (2 * OUT if GATED else OUT) + own
        result += tl.load(bias, mask=inside, other=0).to(tl.float32)
    if GATED:
        up = tl.sum(second, 1)
        if HAS_BIAS:
            up += tl.load(bias + OUT, mask=inside, other=0).to(tl.float32)
        result = result * tl.sigmoid(result) * up
    if SCALED:
        result = result * weight
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def decode_forward(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`[N, H]`; arguments as in `ragged_experts_forward`. One dtype for hidden states and experts, no gradient."""
    tokens, columns = ids.shape
    chosen, scale = ids.reshape(-1).contiguous(), weights.reshape(-1).contiguous()
    hidden = hidden.contiguous()
    gated = self.has_gate and _is_plain_silu(self)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _linear(self, name, hidden, chosen, scale, hidden.dtype, gated=gated)
    if not gated:  # a family's own activation; rows of zeros for dropped pairs
        inner = (self._apply_gate(inner) if self.has_gate else self.act_fn(inner)).contiguous()
    made = _linear(self, "down_proj", inner, chosen, scale, torch.float32, scaled=True)  # [P, H]
    return made.view(tokens, columns, -1).sum(1).to(hidden.dtype)


def _is_plain_silu(self: Any) -> bool:
    """Whether the experts are `silu(gate) * up`, halves one after the other."""
    if type(self)._apply_gate is not _default_apply_gate:
        return False
    return self.act_fn is F.silu or isinstance(self.act_fn, (torch.nn.SiLU, SiLUActivation))


def _linear(
    self: Any,
    name: str,
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    gated: bool = False,
    scaled: bool = False,
) -> Tensor:
    """Each pair's row through its expert's matrix, `[P, out]` in `dtype`."""
    matrices: Tensor = getattr(self, name)
    biases: Tensor | None = getattr(self, f"{name}_bias").contiguous() if self.has_bias else None
    expert_stride, out_stride, in_stride = matrices.stride()
    size = matrices.shape[1]
    if self.is_transposed:
        out_stride, in_stride, size = in_stride, out_stride, matrices.shape[2]
    size = size // 2 if gated else size
    out = torch.empty(len(ids), size, dtype=dtype, device=rows.device)
    block_out, block_in = (SHORT, LONG) if in_stride == 1 else (LONG, SHORT)
    _pair_linear[(len(ids), triton.cdiv(size, block_out))](
        rows,
        matrices,
        matrices if biases is None else biases,
        ids,
        weights,
        out,
        len(ids) // rows.shape[0],
        self.num_experts,
        size,
        rows.shape[1],
        expert_stride,
        out_stride,
        in_stride,
        HAS_BIAS=biases is not None,
        GATED=gated,
        SCALED=scaled,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
    )
    return out
