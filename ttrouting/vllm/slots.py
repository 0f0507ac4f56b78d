"""Where do the routings of the requests in a batch stand, so that a captured graph only reads addresses?

Legend: `L` MoE layers, `S` slots, `E` experts, `N` tokens of a forward.

Slot 0 changes nothing: tokens of plain requests and padding have it. The tensors are made once and written in place.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from ttrouting.errors import CoverageError
from ttrouting.vllm.spec import Wanted

WATCHED = 8  # C3PO's requests whose prompts may end in one step; more wait for the next


class Slots:
    """Persistent tensors, a row for each slot, and which slots are free.

    Attributes:
        token: `[most tokens]` int64, slot of each token of the forward.
        delta: `[L, S, E]` fp32. masked: `[L, S, E]` bool, True for experts that may not be chosen.
        before_scoring: `[S]` bool, whether masks change the weights too.
        override: `[L, S, E]` fp32 logits. override_at: `[most tokens]` bool, tokens that have them.
        floor, p, tau, q, beta, gate: `[S]`, dynamic-k; cut: `[L, S]`. low, high: `[S]`, ranks that stay.
        watch: `[W]` int64, tokens whose router logits are kept in `seen [L, W, E]`.
        adapted: `[S]` bool. counts, kept: `[L, S]` int64, tokens routed and experts run since a slot was given out.
    """

    def __init__(self, layers: int, slots: int, experts: int, tokens: int, device: torch.device) -> None:
        def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.layers, self.size, self.device = layers, slots, device
        self.token = full(0, tokens, dtype=torch.int64)
        self.delta = full(0, layers, slots, experts)
        self.masked = full(0, layers, slots, experts, dtype=torch.bool)
        self.before_scoring = full(0, slots, dtype=torch.bool)
        self.override = full(0, layers, slots, experts)
        self.override_at = full(0, tokens, dtype=torch.bool)
        self.override_on = full(0, layers, slots, dtype=torch.bool)
        self.floor, self.low = full(1, slots, dtype=torch.int64), full(0, slots, dtype=torch.int64)
        self.high = full(1 << 30, slots, dtype=torch.int64)
        self.p, self.tau, self.q = full(1, slots), full(inf, slots), full(1.1, slots)
        self.beta, self.cut, self.gate = full(0, slots), full(-inf, layers, slots), full(-inf, slots)
        self.rescale = full(-1, slots, dtype=torch.int64)  # -1 as the family, 0 never, 1 always
        self.watch = full(0, WATCHED, dtype=torch.int64)
        self.seen = full(0, layers, WATCHED, experts)
        self.adapted = full(0, slots, dtype=torch.bool)
        self.counts = full(0, layers, slots, dtype=torch.int64)
        self.kept = full(0, layers, slots, dtype=torch.int64)
        self.expected = [0] * slots  # tokens that were sent through each slot
        self._free = list(range(slots - 1, 0, -1))
        self._filled = 0  # tokens of `token` that are not 0

    @property
    def free(self) -> int:
        """How many slots nobody has."""
        return len(self._free)

    def take(self, wanted: Wanted, weak: bool) -> int:
        """A slot with this routing in it; `weak`: the weak twin of SCMoE."""
        if not self._free:
            raise CoverageError(f"All {self.size - 1} slots are in use: more requests run than max_num_seqs.")
        slot = self._free.pop()
        if wanted.delta is not None:
            self.delta[:, slot] = wanted.delta.to(self.device)
        if wanted.mask is not None:
            self.masked[:, slot] = ~wanted.mask.to(self.device)
            self.before_scoring[slot] = wanted.before_scoring
        if weak:
            kind, _, count = wanted.scmoe.weak.partition(":")
            self.low[slot] = int(count) - 1 if kind == "rank" else 0
            self.high[slot] = int(count)
        elif wanted.dynamic_k is not None:
            self._limits(slot, wanted.dynamic_k)
        self.adapted[slot] = True
        return slot

    def _limits(self, slot: int, options: Any) -> None:
        """Dynamic-k: every rule is a setting of the same numbers."""
        limits = [options.limits(layer) for layer in range(self.layers)]
        first = limits[0]
        self.floor[slot] = first.floor
        self.p[slot] = 1.0 if first.p is None else first.p
        self.tau[slot] = inf if first.tau is None else first.tau
        self.q[slot] = first.q
        self.beta[slot] = 0.0 if first.beta is None else first.beta
        self.gate[slot] = -inf if first.gate is None else first.gate
        if first.cut is not None:
            self.cut[:, slot] = torch.tensor([one.cut for one in limits], device=self.device)
        self.rescale[slot] = {"family": -1, "never": 0, "always": 1}[options.renormalize]

    def set_override(self, slot: int, logits: Tensor, first: int) -> None:
        """Router logits `[L, E]` for the one token of a slot, from layer `first` up."""
        self.override[:, slot] = logits.to(self.device)
        self.override_on[first:, slot] = True

    def set_delta(self, slot: int, *deltas: Tensor | None) -> None:
        """Make the sum of these `[L, E]` the delta of a slot; None counts as 0."""
        self.delta[:, slot] = sum(delta.to(self.device) for delta in deltas if delta is not None)

    def give_back(self, slot: int) -> None:
        """Make a slot change nothing again."""
        for tensor, value in (
            (self.delta, 0),
            (self.masked, 0),
            (self.override, 0),
            (self.override_on, 0),
            (self.cut, -inf),
            (self.counts, 0),
            (self.kept, 0),
        ):
            tensor[:, slot] = value
        for tensor, value in (
            (self.before_scoring, 0),
            (self.floor, 1),
            (self.low, 0),
            (self.high, 1 << 30),
            (self.p, 1),
            (self.tau, inf),
            (self.q, 1.1),
            (self.beta, 0),
            (self.gate, -inf),
            (self.rescale, -1),
            (self.adapted, 0),
        ):
            tensor[slot] = value
        self.expected[slot] = 0
        self._free.append(slot)

    def place(self, spans: list[tuple[int, int, int]], overrides: list[int], watched: list[int]) -> None:
        """Say which tokens of the next forward belong to which slot.

        Args:
            spans: `(first token, end, slot)` of adapted requests. overrides: tokens whose logits are replaced.
            watched: tokens whose logits are kept, at most `WATCHED`.
        """
        last = max((end for _, end, _ in spans), default=0)
        reach = max(last, self._filled)  # what the forward before has filled becomes 0 again
        if reach == 0:
            return
        token, override_at = torch.zeros(reach, dtype=torch.int64), torch.zeros(reach, dtype=torch.bool)
        for begin, end, slot in spans:
            token[begin:end] = slot
            self.expected[slot] += end - begin
        override_at[overrides] = True
        self.token[:reach].copy_(token)
        self.override_at[:reach].copy_(override_at)
        if watched:
            self.watch[: len(watched)].copy_(torch.tensor(watched))
        self._filled = last

    def check(self, slots: list[int]) -> None:
        """Raise unless every layer routed every token of these slots.

        Raises:
            CoverageError: a kernel or a compiled graph went past the taps.
        """
        seen = self.counts[:, slots].cpu()  # [L, n]
        wanted = torch.tensor([self.expected[slot] for slot in slots])
        if not bool((seen == wanted).all()):
            layer = int((seen != wanted).any(1).nonzero()[0])
            raise CoverageError(
                f"Layer {layer} routed {seen[layer].tolist()} tokens of adapted requests where {wanted.tolist()} "
                "were sent: its routing was bypassed. Start with --enforce-eager and a Triton MoE backend."
            )
