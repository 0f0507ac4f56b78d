"""SCMoE as its paper reads: "Unchosen Experts Can Contribute Too", arXiv 2405.14507.

Two forwards in turn with two caches: `generate` runs the strong one, a logits processor the weak one, in which every
token meets only the expert of rank r at every layer.

    python demos/baselines/scmoe_baseline.py

Legend: `B` sequences, `T` tokens, `V` vocabulary, `N` tokens of a forward, `E` experts, `K` per token.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from ttrouting.baselines.routers import choose, probabilities, renormalises, routed


def generate(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
    rank: int = 2,
    **arguments: Any,
) -> Tensor:
    """`new_tokens` greedy tokens of the contrasted logits after prompts `ids [B, T]` of one length.

    Args:
        alpha: plausibility threshold. beta: contrast strength. rank: of the weak expert, from 1.
        arguments: go to `model.generate`.
    """
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=[Contrast(model, ids, alpha, beta, rank)],
        **arguments,
    )


class Contrast(LogitsProcessor):
    """`z = (1 + beta) z_strong - beta z_weak` where `z_strong >= log(alpha) + max z_strong`, else -inf."""

    def __init__(self, model: Any, prompt: Tensor, alpha: float, beta: float, rank: int) -> None:
        self.model, self.alpha, self.beta, self.rank = model, alpha, beta, rank
        self.cache = DynamicCache(config=model.config)
        self.read = 0  # tokens in the weak cache
        self.weak = self._forward(prompt)  # [B, V]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.read:
            self.weak = self._forward(input_ids)
        strong = scores  # [B, V]
        plausible = strong >= log(self.alpha) + strong.amax(-1, keepdim=True)
        mixed = (1 + self.beta) * strong - self.beta * self.weak.to(strong)
        return mixed.masked_fill(~plausible, float("-inf"))

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        """Weak logits after the last token, from what is new in `ids [B, T]`."""
        with routed(self.model, self._weak):
            out = self.model(ids[:, self.read :], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.read = ids.shape[1]
        return out.logits[:, -1]

    def _weak(self, _layer: int, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids `[N, 1]`: the expert of this rank, with the weight that the family would give."""
        pi = probabilities(logits)
        ids = pi.argsort(dim=-1, descending=True, stable=True)[:, self.rank - 1 : self.rank]
        if renormalises(router):
            return choose(router, logits)[0].sum(-1, keepdim=True), ids
        return pi.gather(1, ids), ids


def main() -> None:
    import ttrouting as ttr

    model, tokenizer = ttr.load_pocket()
    ids = tokenizer("Q: 12+30\nA: 42\nQ: 12+7\nA:", return_tensors="pt").input_ids
    print(repr(tokenizer.decode(generate(model, ids, 4)[0, ids.shape[1] :])))


if __name__ == "__main__":
    main()
