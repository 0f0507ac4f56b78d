"""Which kernel computes a ragged set of (token, expert) pairs here? Registered with transformers as `ttrouting`.

Legend: `N` tokens, `H` hidden size, `E` experts, `K` columns of the choice (any number), `I` an expert's inner size.

A weight of exactly 0 and an id of `E` or more both mean "dropped": nothing is computed for that pair, and the
weight gets no gradient. Who drops by multiplying with a mask loses nothing: that gradient is multiplied with
the mask's 0 as well. Every other pair passes gradients to hidden states, weights and expert parameters.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ttrouting.kernels.cpu import cpu_forward
from ttrouting.kernels.grouped import grouped_forward

NAME = "ttrouting"
HAS_TRITON = find_spec("triton") is not None
DECODE_PAIRS = 128  # on a GPU: up to here each pair reads its expert by itself; to be measured on one


def ragged_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output `[N, H]`, for any experts class that transformers' registry serves.

    On a CPU the number of pairs is read from the data. Elsewhere, and under `torch.compile`, shapes are static and
    nothing waits for the device.

    Args:
        self: the experts module. hidden_states: `[N, H]`. top_k_index: `[N, K]` ids. top_k_weights: `[N, K]`.
    """
    if torch.compiler.is_compiling() or hidden_states.device.type != "cpu":
        if _decodes(self, hidden_states, top_k_index, top_k_weights):
            from ttrouting.kernels.triton_decode import decode_forward

            return decode_forward(self, hidden_states, top_k_index, top_k_weights)
        return grouped_forward(self, hidden_states, top_k_index, top_k_weights)
    return cpu_forward(self, hidden_states, top_k_index, top_k_weights)


def _decodes(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> bool:
    """Whether the decode kernel takes this call: few pairs, a CUDA device, no gradient, not being traced."""
    if not HAS_TRITON or hidden.device.type != "cuda" or ids.numel() > DECODE_PAIRS or torch.compiler.is_compiling():
        return False
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    if hidden.dtype != first.dtype or first.dtype == torch.float64 or torch.is_autocast_enabled("cuda"):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weights, first)))


ALL_EXPERTS_FUNCTIONS.register(NAME, ragged_experts_forward)
