"""How each family chooses experts, in plain lines written from its description. Shares no code with ttrouting.

Legend: `N` tokens, `C` columns of the router's linear, `E` experts, `K` per token. Everything in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INF = float("inf")


@dataclass
class Place:
    """One MoE layer and what it is asked about."""

    family: str
    router: nn.Module
    block: nn.Module
    config: Any
    tokens: Tensor  # [N] the token ids that are routed

    @property
    def top_k(self) -> int:
        names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
        if self.family == "dbrx":
            return self.config.ffn_config.moe_top_k
        if self.family == "phimoe":  # its rule is written for two, whatever the config says
            return 2
        return next(getattr(self.config, n) for n in names if hasattr(self.config, n))


@dataclass
class Choice:
    """Experts of each token, and for Inkling the weights of its shared experts."""

    ids: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    certain: Tensor  # [N] bool, False where the last expert was a draw
    shared: Tensor | None = None  # [N, shared]

    def dense(self, experts: int) -> Tensor:
        """`[N, E]` weight of each expert, 0 for those not chosen."""
        return self.weights.new_zeros(len(self.ids), experts).scatter_add(1, self.ids, self.weights)


# --- logits ---------------------------------------------------------------------------------------------

# where the router's input is seen, and which module holds the matrix; the router itself where not listed
INPUT_AT = {"gemma4_text": "proj", "zaya": "router_mlp.out_proj"}
MATRIX_OF = {
    "afmoe": "gate",
    "dbrx": "layer",
    "gemma4_text": "proj",
    "hunyuan_v1_moe": "wg",
    "jetmoe": "layer",
    "longcat_flash": "classifier",
    "zaya": "router_mlp.out_proj",
}
# families that cast the router's input and matrix to fp32, whatever the model's dtype
FP32_ROUTER = """
    axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe ernie4_5_vl_moe_text exaone_moe glm4_moe
    glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 kimi_linear longcat_flash mimo_v2_flash nemotron_h solar_open
    glm4v_moe_text glm5_next_text deepseek_ocr2_text openai_privacy_filter
"""


def input_module(family: str, router: nn.Module) -> nn.Module:
    """The module whose input is multiplied by the router's matrix."""
    return attrgetter(INPUT_AT[family])(router) if family in INPUT_AT else router


def native_logits(family: str, router: nn.Module, hidden: Tensor) -> Tensor:
    """`[N, C]` fp64, rounded as the family rounds them."""
    holder = attrgetter(MATRIX_OF[family])(router) if family in MATRIX_OF else router
    hidden = hidden.reshape(-1, hidden.shape[-1])
    dtype = hidden.dtype
    if family in FP32_ROUTER.split() and dtype != torch.float64:
        dtype = torch.float32
    bias = getattr(holder, "bias", None)
    if family == "longcat_flash":
        bias = None
    return F.linear(hidden.to(dtype), holder.weight.to(dtype), None if bias is None else bias.to(dtype)).double()


# --- rules ----------------------------------------------------------------------------------------------


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def sqrt_softplus(z: Tensor) -> Tensor:
    return torch.log1p(torch.exp(z)).sqrt()


def best(scores: Tensor, k: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of those kept `[N, K]`, and whether the last place was no draw `[N]`."""
    if keep is not None:  # a kept expert beats a masked one even where a group limit has set it to -inf
        scores = torch.where(keep, scores.clamp_min(-1e30), torch.full_like(scores, -INF))
    values, order = scores.sort(-1, descending=True)
    return order[:, :k], values[:, k - 1] > values[:, k]


def in_groups(choice: Tensor, groups: int, allowed: int, count: int, fill: float) -> Tensor:
    """Only experts of the `allowed` best groups; a group is worth the sum of its `count` best experts."""
    worth = choice.view(len(choice), groups, -1).sort(-1, descending=True).values[..., :count].sum(-1)
    chosen = worth.sort(-1, descending=True).indices[:, :allowed]
    keep = torch.zeros_like(worth).scatter(1, chosen, 1.0).repeat_interleave(choice.shape[1] // groups, 1)
    return torch.where(keep == 1, choice, torch.full_like(choice, fill))


def by_score(
    place: Place,
    z: Tensor,
    keep: Tensor | None,
    *,
    score: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
    groups: tuple[int, int, int, float] | None = None,
    renormalise: bool = False,
    floor: float = 0.0,
    scale: float = 1.0,
) -> Choice:
    """Score all experts, choose by score plus bias inside groups, weigh by score."""
    scores = score(z)
    choice = scores if bias is None else scores + bias.double().flatten()
    if groups is not None:
        choice = in_groups(choice, *groups)
    ids, certain = best(choice, place.top_k, keep)
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + floor)
    return Choice(ids, weights * scale, certain)


def by_logit(
    place: Place, z: Tensor, keep: Tensor | None, *, weigh: Callable[[Tensor], Tensor] = softmax, scale: float = 1.0
) -> Choice:
    """Choose by raw logit, weigh the chosen ones among themselves."""
    ids, certain = best(z, place.top_k, keep)
    return Choice(ids, weigh(z.gather(1, ids)) * scale, certain)


def normed_softmax(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """OLMoE and the Qwen line: renormalised only if the config says so."""
    return by_score(place, z, keep, score=softmax, renormalise=place.config.norm_topk_prob)


def deepseek_v3(place: Place, z: Tensor, keep: Tensor | None, fill: float = -INF) -> Choice:
    """Sigmoid plus correction bias, groups worth their two best, renormalised and scaled."""
    c = place.config
    return by_score(
        place,
        z,
        keep,
        score=sigmoid,
        bias=place.router.e_score_correction_bias,
        groups=None if c.n_group is None else (c.n_group, c.topk_group, 2, fill),
        renormalise=c.norm_topk_prob,
        floor=1e-20,
        scale=c.routed_scaling_factor,
    )


def deepseek_v2(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """Softmax; groups worth their best expert; what a group limit excludes has score 0."""
    c = place.config
    scores = softmax(z)
    if c.topk_method == "group_limited_greedy":
        scores = in_groups(scores, c.n_group, c.topk_group, 1, 0.0)
    ids, certain = best(scores, place.top_k, keep)
    return Choice(ids, scores.gather(1, ids) * c.routed_scaling_factor, certain)


def deepseek_v4(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """Square root of softplus plus bias; the first layers look experts up by token id."""
    if not hasattr(place.router, "tid2eid"):
        return by_score(
            place,
            z,
            keep,
            score=sqrt_softplus,
            bias=place.router.e_score_correction_bias,
            renormalise=True,
            scale=place.config.routed_scaling_factor,
        )
    ids = place.router.tid2eid[place.tokens]
    weights = sqrt_softplus(z).gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * place.config.routed_scaling_factor
    return Choice(ids, weights, torch.ones_like(ids[:, 0], dtype=torch.bool))


def mistral4(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    c = place.config
    groups = (c.n_group, c.topk_group, 2, 0.0)
    scale = c.routed_scaling_factor
    return by_score(place, z, keep, score=softmax, groups=groups, renormalise=c.norm_topk_prob, scale=scale)


def block_biased(place: Place, z: Tensor, keep: Tensor | None, *, bias: str, scale: str | None = None) -> Choice:
    """Sigmoid plus a bias that the block keeps, always renormalised."""
    factor = getattr(place.config, scale) if scale else 1.0
    values = getattr(place.block, bias)
    return by_score(place, z, keep, score=sigmoid, bias=values, renormalise=True, scale=factor)


def router_biased(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """Sigmoid plus the router's bias, always renormalised; the block scales after its experts."""
    return by_score(place, z, keep, score=sigmoid, bias=place.router.e_score_correction_bias, renormalise=True)


def laguna(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    cap = place.config.moe_router_logit_softcapping
    return router_biased(place, cap * torch.tanh(z / cap) if cap > 0 else z, keep)


def ernie(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    bias = place.router.moe_statics.e_score_correction_bias
    choice = by_score(place, z, keep, score=softmax, bias=bias)
    total = choice.weights.sum(-1, keepdim=True).clamp(min=place.config.moe_norm_min)
    return Choice(choice.ids, choice.weights / total, choice.certain)


def lfm2(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    c = place.config
    bias = place.block.expert_bias if c.use_expert_bias else None
    norm, scale = c.norm_topk_prob, c.routed_scaling_factor
    return by_score(place, z, keep, score=sigmoid, bias=bias, renormalise=norm, floor=1e-6, scale=scale)


def longcat(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    bias, scale = place.router.e_score_correction_bias, place.config.routed_scaling_factor
    return by_score(place, z, keep, score=softmax, bias=bias, scale=scale)


def gemma4(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    choice = by_score(place, z, keep, score=softmax, renormalise=True)
    factor = place.router.per_expert_scale.double()[choice.ids]
    return Choice(choice.ids, choice.weights * factor, choice.certain)


def dbrx(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    choice = by_score(place, z, keep, score=softmax)
    p = place.config.ffn_config.moe_normalize_expert_weights
    if p is not None:
        choice.weights = choice.weights / choice.weights.abs().pow(p).sum(-1, keepdim=True).pow(1 / p)
    return choice


def cohere2(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    if place.config.expert_selection_fn == "softmax":
        return by_logit(place, z, keep)
    if not place.config.norm_topk_prob:
        return by_logit(place, z, keep, weigh=sigmoid)
    return by_logit(place, z, keep, weigh=lambda chosen: sigmoid(chosen) / sigmoid(chosen).sum(-1, keepdim=True))


def privacy_filter(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    return by_logit(place, z, keep, scale=1 / place.top_k)


def inkling(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """Chosen and shared experts are normalised together."""
    router, shared = place.router, place.router.n_shared_experts
    scores = sigmoid(z)  # [N, E + shared]
    ids, certain = best(scores[:, :-shared] + router.e_score_correction_bias.double(), place.top_k, keep)
    joint = torch.cat([scores.gather(1, ids), scores[:, -shared:]], 1)
    joint = joint / joint.sum(-1, keepdim=True) * place.config.route_scale * router.global_scale.double()
    return Choice(ids, joint[:, : place.top_k], certain, joint[:, place.top_k :])


def sparsemixer(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """Phi: the best expert, weighed by a softmax over those close to it; then the same without it."""
    if keep is not None:
        z = torch.where(keep, z, torch.full_like(z, -1e9))
    near = 2 * place.config.router_jitter_noise
    left, picked, weights = z, [], []
    for _ in range(2):
        top, first = left.max(-1, keepdim=True)
        far = (top - z) / torch.maximum(z.abs(), top) > near
        weights.append(softmax(left.masked_fill(far, -INF)).gather(1, first))
        picked.append(first)
        left = left.scatter(1, first, -INF)
    ordered = z.sort(-1, descending=True).values
    return Choice(torch.cat(picked, 1), torch.cat(weights, 1), ordered[:, 1] > ordered[:, 2])


def zaya(place: Place, z: Tensor, keep: Tensor | None) -> Choice:
    """One of E + 1 classes; the last one skips the experts."""
    choice = by_score(place, z, keep, score=softmax, bias=place.router.balancing_biases)
    skipped = choice.ids == place.config.num_experts
    return Choice(choice.ids.masked_fill(skipped, 0), choice.weights.masked_fill(skipped, 0.0), choice.certain)


Rule = Callable[[Place, Tensor, Tensor | None], Choice]
always_softmax = partial(by_score, score=softmax, renormalise=True)

RULES: dict[str, Rule] = {
    "afmoe": partial(block_biased, bias="expert_bias", scale="route_scale"),
    "aria_text": by_logit,
    "axk1": deepseek_v3,
    "axk2": partial(deepseek_v3, fill=0.0),
    "cohere2_moe": cohere2,
    "dbrx": dbrx,
    "deepseek_ocr2_text": deepseek_v2,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v3,
    "deepseek_v4": deepseek_v4,
    "dots1": deepseek_v3,
    "ernie4_5_moe": ernie,
    "ernie4_5_vl_moe_text": ernie,
    "exaone_moe": deepseek_v3,
    "flex_olmo": normed_softmax,
    "gemma4_text": gemma4,
    "glm4_moe": deepseek_v3,
    "glm4_moe_lite": deepseek_v3,
    "glm4v_moe_text": deepseek_v3,
    "glm5_next_text": deepseek_v3,
    "glm_moe_dsa": deepseek_v3,
    "gpt_oss": by_logit,
    "granitemoe": by_logit,
    "granitemoe_swa": by_logit,
    "granitemoehybrid": by_logit,
    "granitemoeshared": by_logit,
    "hunyuan_v1_moe": always_softmax,
    "hy_v3": partial(block_biased, bias="e_score_correction_bias", scale="router_scaling_factor"),
    "hy_v4": deepseek_v3,
    "inkling_text": inkling,
    "jamba": partial(by_score, score=softmax),
    "jetmoe": by_logit,
    "kimi_linear": deepseek_v3,
    "laguna": laguna,
    "lfm2_moe": lfm2,
    "llama4_text": partial(by_logit, weigh=sigmoid),
    "longcat_flash": longcat,
    "mellum": normed_softmax,
    "mimo_v2_flash": deepseek_v3,
    "minimax": always_softmax,
    "minimax_m2": partial(block_biased, bias="e_score_correction_bias"),
    "minimax_m3_vl_text": router_biased,
    "mistral4": mistral4,
    "mixtral": always_softmax,
    "nemotron_h": deepseek_v3,
    "olmoe": normed_softmax,
    "openai_privacy_filter": privacy_filter,
    "phimoe": sparsemixer,
    "qwen2_moe": normed_softmax,
    "qwen3_5_moe_text": always_softmax,
    "qwen3_moe": normed_softmax,
    "qwen3_next": normed_softmax,
    "qwen3_omni_moe_text": normed_softmax,
    "qwen3_vl_moe_text": always_softmax,
    "qwen4_exp_text": normed_softmax,
    "solar_open": deepseek_v3,
    "step3p5": router_biased,
    "zaya": zaya,
}


def choose(place: Place, z: Tensor, keep: Tensor | None = None) -> Choice:
    """The family's choice from logits `[N, C]`, among the experts of `keep [N, E]` bool if given."""
    return RULES[place.family](place, z, keep)
