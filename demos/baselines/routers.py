"""How do the baselines change routing? By forward hooks that choose anew from a router's logits.

For softmax routers that return `(logits, weights, ids)`: OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE of transformers.

Legend: `N` tokens of a forward, `E` experts, `K` per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

KNOWN = ("OlmoeTopKRouter", "MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")
Edit = Callable[[int, nn.Module, Tensor], tuple[Tensor, Tensor]]


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer, in order.

    Raises:
        ValueError: there is none, or one of another kind.
    """
    found: list[Any] = [m.gate for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    kinds = sorted({type(router).__name__ for router in found})
    if not kinds or any(kind not in KNOWN for kind in kinds):
        raise ValueError(f"The baselines know the routers {', '.join(KNOWN)}, this model has {kinds or 'none'}.")
    return found


def renormalises(router: Any) -> bool:
    """Whether the weights of the chosen experts are divided by their sum."""
    return type(router).__name__ == "MixtralTopKRouter" or bool(router.norm_topk_prob)


def probabilities(logits: Tensor) -> Tensor:
    """`pi [N, E]` in fp32, as all of these families have it (fp64 stays)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def choose(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The family's own choice from logits `[N, E]`: weights and ids, `[N, K]` each."""
    weights, ids = probabilities(logits).topk(router.top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalises(router) else weights), ids


@contextmanager
def routed(model: nn.Module, edit: Edit) -> Iterator[None]:
    """Inside the block `edit(layer, router, logits)` gives the weights and ids that the experts get."""

    def hook(layer: int, router: nn.Module, _args: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, own, _ = output
        weights, ids = edit(layer, router, logits)
        return logits, weights.to(own.dtype), ids

    hooks = [router.register_forward_hook(partial(hook, i)) for i, router in enumerate(find_routers(model))]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
