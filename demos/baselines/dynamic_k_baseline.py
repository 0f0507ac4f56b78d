"""Top-p routing as its paper reads, on a model with a fixed K: "Harder Tasks Need More Experts", arXiv 2403.07652.

Experts that a token does not need get weight 0. They are computed all the same, so nothing is saved.

    python demos/baselines/dynamic_k_baseline.py

Legend: `B` sequences, `T` tokens, `N` tokens of a forward, `E` experts, `K` per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.baselines.routers import choose, probabilities, renormalises, routed


def generate(model: Any, ids: Tensor, new_tokens: int, *, p: float = 0.8, k_min: int = 1, **arguments: Any) -> Tensor:
    """`new_tokens` greedy tokens after prompts `ids [B, T]` of one length.

    Args:
        p: share of probability that the kept experts reach. k_min: experts kept at least.
        arguments: go to `model.generate`.
    """

    def edit(_layer: int, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = choose(router, logits)  # [N, K], best first
        pi = probabilities(logits).gather(1, chosen)
        keep = pi.cumsum(-1) - pi < p  # what comes before an expert does not reach p yet
        keep[:, :k_min] = True
        thinned = weights * keep
        if renormalises(router):
            thinned = thinned * weights.sum(-1, keepdim=True) / thinned.sum(-1, keepdim=True)
        return thinned, chosen

    with routed(model, edit):
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **arguments,
        )


def main() -> None:
    import ttrouting as ttr

    model, tokenizer = ttr.load_pocket()
    ids = tokenizer("Q: 12+30\nA: 42\nQ: 12+7\nA:", return_tensors="pt").input_ids
    print(repr(tokenizer.decode(generate(model, ids, 4, p=0.5)[0, ids.shape[1] :])))


if __name__ == "__main__":
    main()
