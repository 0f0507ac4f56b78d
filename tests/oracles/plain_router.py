"""OLMoE, Mixtral and DeepSeek-V3 routing in plain lines, put into a model by hand. Shares no code with ttrouting.

Legend: `N` tokens, `E` experts, `K` per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Rule = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer, in order."""
    return [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]


def family_scores(router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`(scores before bias, scores the choice is made by)`, `[N, E]` each."""
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3
        scores = 1 / (1 + torch.exp(-logits))
        choice = scores + router.e_score_correction_bias
        groups = choice.view(len(choice), router.num_group, -1)
        best = groups.sort(-1, descending=True).values[..., :2].sum(-1)  # [N, groups]
        keep = best.sort(-1, descending=True).indices[:, : router.topk_group]
        allowed = torch.zeros_like(best).scatter(1, keep, 1.0)[:, :, None].expand_as(groups).reshape(choice.shape)
        return scores, choice.masked_fill(allowed == 0, float("-inf"))
    scores = torch.exp(logits - logits.max(-1, keepdim=True).values)
    scores = scores / scores.sum(-1, keepdim=True)
    return scores, scores


def family_weights(router: nn.Module, scores: Tensor) -> Tensor:
    """Weights of the chosen experts from their scores, `[N, K]` -> `[N, K]`."""
    if "Mixtral" in type(router).__name__ or getattr(router, "norm_topk_prob", False):
        scores = scores / scores.sum(-1, keepdim=True)
    return scores * getattr(router, "routed_scaling_factor", 1.0)


def top_k_rule(router: nn.Module, scores: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """The family's own choice: `(ids, weights)`."""
    ids = choice.sort(-1, descending=True).indices[:, : router.top_k]
    return ids, family_weights(router, scores.gather(1, ids))


@contextmanager
def plain_routing(
    model: nn.Module, delta: Tensor | None = None, rule: Callable[..., tuple[Tensor, Tensor]] = top_k_rule
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Route by the lines above, with `delta [L, E]` or `[B, L, E]` on the logits.

    Gives a list that fills with `(logits, scores)` of each router call.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def make(router: nn.Module, layer: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def forward(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = flat @ router.weight.T.to(flat.dtype)
            if delta is not None and delta.dim() == 2:
                logits = logits + delta[layer]
            elif delta is not None:
                logits = logits + delta[:, layer].repeat_interleave(len(flat) // len(delta), 0)
            scores, choice = family_scores(router, logits)
            seen.append((logits, scores))
            ids, weights = rule(router, scores, choice)
            return logits, weights, ids

        return forward

    found = routers(model)
    for layer, router in enumerate(found):
        router.forward = make(router, layer)
    try:
        yield seen
    finally:
        for router in found:
            del router.forward


def full_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of every position, no cache; `[B, T, V]`."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, steps: int, **routing: object) -> Tensor:
    """Greedy decoding by a full forward for every token. No stop, no cache."""
    for _ in range(steps):
        with plain_routing(model, **routing):
            ids = torch.cat([ids, full_logits(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids
