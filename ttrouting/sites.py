"""Find the MoE layers of a model by structure, and probe how each of them routes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.direct import DirectRouter
from ttrouting.errors import NotMoEError, UnsupportedModelError
from ttrouting.offload import check_loaded, resident
from ttrouting.scoring import WeightRule

ROUTER_NAMES = ("router", "gate")

REFUSED_MODELS = {
    "doge": (
        "its router mixes tokens across the batch (product keys over a flattened view), so routing "
        "is neither per token nor equal in batches of different sizes"
    ),
    "switch_transformers": (
        "it is an encoder-decoder with one-hot dispatch and capacity drops, so a token's experts "
        "depend on its neighbours"
    ),
    "nllb-moe": (
        "it is an encoder-decoder whose experts upstream run only numbers 0 and 1, whatever the router chooses"
    ),
}

NO_BEAMS = "its cache does not follow a beam reorder (nor a crop) upstream: no beam search"

# what a whole model cannot do, said at each of its sites
MODEL_LIMITS = {
    "minimax": (NO_BEAMS,),
    "deepseek_v4": ("left padding changes its compressed attention upstream: give prompts of one length",),
    "openai_privacy_filter": ("not causal: forwards only, no generate and no rerouting",),
    "ernie4_5_vl_moe_text": ("text only: tokens of pictures have experts of their own and lose their rows",),
}


@dataclass(frozen=True, eq=False)
class Site:
    """One MoE layer.

    Attributes:
        name: module path of the MoE block, e.g. `model.layers.3.mlp`.
        index: position `l` among the model's sites, 0-based; row of every `[L, E]` tensor.
        num_experts: `E`, what the router chooses from (identity and skip experts included).
        top_k: `K`, the model's own experts per token.
        rule: how logits become mixing weights, probed on real activations.
        linear_index: which `F.linear` inside the router gives the logits (the last one).
        topk_index: which `topk` chooses the experts, -1 where there is none.
        topk_in: where experts are chosen: `"router"`, `"block"` (the MoE block), `"logits"` (a chain of
            maxima over logits, no top-k) or `"table"` (fixed by token id).
        interface: how the choice reaches the experts: `"experts"` (ids and weights as arguments),
            `"dense"` (Llama4: a score for every expert) or `"sorted"` (JetMoe: a sorted dispatch).
        edit_dtype: dtype in which logits are edited: fp32, the model's own where that is all its scoring takes.
        half_scores: the family scores in half precision, so rows without an edit take a native run's result.
        least_columns: how many columns of ids and weights the experts take at least (LongCat fails on one).
        weight_dtype: dtype in which the experts expect their weights.
        real_experts: ids from here on stand for "no expert" once chosen (Zaya's skip expert).
        limits: what this layer cannot do, in words.
        direct: the router as plain operations, where they give its bits; taps then need no function mode.
    """

    name: str
    index: int
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module | None = field(repr=False)
    num_experts: int
    top_k: int
    rule: WeightRule
    linear_index: int
    topk_index: int
    topk_in: str
    interface: str
    edit_dtype: torch.dtype
    half_scores: bool
    least_columns: int
    weight_dtype: torch.dtype
    real_experts: int
    limits: tuple[str, ...] = ()
    direct: DirectRouter | None = field(default=None, repr=False)

    @property
    def scoring(self) -> str:
        """Name of the scoring rule: softmax, sigmoid, sqrt_softplus, choice or other."""
        return self.rule.scoring

    @property
    def renormalises(self) -> bool:
        """Whether the family divides the chosen weights by their sum."""
        return self.rule.renormalises

    @property
    def chooses(self) -> bool:
        """Whether experts are chosen by score (False: by a fixed token-to-expert table)."""
        return self.topk_in != "table"

    @property
    def expert_scale(self) -> Tensor | None:
        """`[E]` a learned factor on each expert's weight (Gemma 4), or None."""
        return expert_scale(self.router)


def expert_scale(router: nn.Module) -> Tensor | None:
    """`[E]` a learned factor on each expert's weight (Gemma 4), or None."""
    return resident(router, "per_expert_scale")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A block that looks like an MoE layer, before it was seen at work."""

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module | None
    interface: str


def candidates(model: nn.Module) -> list[Candidate]:
    """Blocks with a child `experts` beside a child `router` or `gate`, and JetMoe's MLP blocks."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[r] for r in ROUTER_NAMES if r in children), None)
        if router is None:
            continue
        if "experts" in children:
            dense = type(router).__name__ == "Llama4Router"
            found.append(Candidate(name, module, router, children["experts"], "dense" if dense else "experts"))
        elif {"input_linear", "output_linear"} <= set(children) and not hasattr(module, "map"):
            # `map` marks JetMoe's attention router, whose k is tied to the number of query heads
            found.append(Candidate(name, module, router, None, "sorted"))
    return found


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_sites(model: nn.Module) -> list[Site]:
    """The MoE layers of `model`, in forward order.

    Runs the model once on sixteen tokens (twice through each router in half precision) to see where
    its logits and choices appear and how weights follow from them. Nothing is left behind.

    Raises:
        NotMoEError: no MoE layer was found; the message says what was searched.
        UnsupportedModelError: the family cannot be adapted, a router is bypassed by a fused kernel, or weights
            are not loaded.
    """
    from ttrouting.probe import probe_sites

    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", "")
    if model_type in REFUSED_MODELS:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be adapted: {REFUSED_MODELS[model_type]}. "
            "Use a decoder-only MoE, for example OLMoE, Mixtral or Qwen3-MoE."
        )
    found = candidates(model)
    if not found:
        modules = sum(1 for _ in model.modules())
        raise NotMoEError(
            f"No MoE layer in {type(model).__name__}: searched {modules} modules for a child 'experts' "
            f"beside a child {' or '.join(map(repr, ROUTER_NAMES))} and found none. "
            "Load a Mixture-of-Experts model, or the pocket model with ttr.load_pocket()."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder. Only decoder-only models are supported."
        )
    text = text_config(config)
    limits = {limit for c in (config, text) for limit in MODEL_LIMITS.get(getattr(c, "model_type", ""), ())}
    check_loaded(model)
    sites = probe_sites(model, found)
    return [replace(site, limits=(*site.limits, *sorted(limits))) for site in sites] if limits else sites
