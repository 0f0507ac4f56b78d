"""What each family should be found to do, written by hand from its description and its tiny config.

Every scaling factor of the tiny configs is 1.5; where the block applies it after its experts the weights do not
show it. Layer numbers count the layers that hold experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALL_EXPERTS = ("eager", "grouped_mm", "batched_mm")
OWN_EXPERTS = ("eager",)  # written without the common experts interface


@dataclass(frozen=True)
class Variant:
    """The same family with another config."""

    changes: dict[str, Any]
    scoring: str
    renormalises: bool
    scaling: float = 1.0


@dataclass(frozen=True)
class Expected:
    """One family.

    Attributes:
        routers: module path of its routers, `N` for the layer number.
        layers: which layers have one.
        scoring, renormalises, scaling: how logits become weights.
        experts, top_k: `E` that the router chooses from, and `K`.
        dtype: in which logits are edited in a bf16 model.
        half_scores: whether the family scores in bf16 there, so that unedited rows need a native run.
        implementations: of the experts.
        interface: how the choice reaches the experts.
        head: `lm`, `none` (the text backbone of a larger model) or `classifier`.
        left_padding: whether the model itself gives a padded row the same logits as the row alone.
        beams: whether the model's own beam search works.
        limits: a part of each limit that is to be listed.
        variants: further configs of the family.
    """

    routers: str
    layers: tuple[int, ...]
    scoring: str
    renormalises: bool
    scaling: float = 1.0
    experts: int = 8
    top_k: int = 3
    dtype: str = "float32"
    half_scores: bool = False
    implementations: tuple[str, ...] = ALL_EXPERTS
    interface: str = "experts"
    head: str = "lm"
    left_padding: bool = True
    beams: bool = True
    limits: tuple[str, ...] = ()
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return self.head == "lm"

    def router_names(self) -> list[str]:
        """Module paths, in order."""
        return [self.routers.replace("N", str(i), 1) for i in self.layers]


FOUR, THREE = (0, 1, 2, 3), (1, 2, 3)  # all of four layers; the first one is dense
GATE, ROUTER = "model.layers.N.mlp.gate", "model.layers.N.mlp.router"


def _if_normed(value: bool, scaling: float = 1.0, scoring: str = "softmax") -> dict[str, Variant]:
    return {f"norm_topk_prob={value}": Variant({"norm_topk_prob": value}, scoring, value, scaling)}


def _deepseek(routers: str = GATE, layers: tuple[int, ...] = THREE, **more: Any) -> Expected:
    """Sigmoid with a correction bias and groups; renormalised if `norm_topk_prob`, the default."""
    return Expected(routers, layers, "sigmoid", True, 1.5, variants=_if_normed(False, 1.5, "sigmoid"), **more)


def _logits_first(routers: str, **more: Any) -> Expected:
    """Top-k on raw logits, softmax over the chosen: as if softmax were renormalised."""
    return Expected(routers, FOUR, "softmax", True, **more)


EXPECTED: dict[str, Expected] = {
    "afmoe": Expected(ROUTER, THREE, "sigmoid", True, 1.5),
    "aria_text": _logits_first(ROUTER, half_scores=True),
    "axk1": _deepseek(),
    "axk2": Expected(
        GATE,
        THREE,
        "sigmoid",
        True,
        1.5,
        variants={"no groups": Variant({"n_group": None, "topk_group": None}, "sigmoid", True, 1.5)},
    ),
    "cohere2_moe": _logits_first(
        GATE,
        variants={
            "sigmoid": Variant({"expert_selection_fn": "sigmoid", "norm_topk_prob": False}, "sigmoid", False),
            "sigmoid, normed": Variant({"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, "sigmoid", True),
        },
    ),
    "dbrx": Expected(
        "transformer.blocks.N.ffn.router",
        (0, 1, 2),
        "softmax",
        True,
        dtype="bfloat16",
        implementations=OWN_EXPERTS,
    ),
    "deepseek_v2": Expected(
        GATE,
        THREE,
        "softmax",
        False,
        1.5,
        variants={"greedy": Variant({"topk_method": "greedy"}, "softmax", False, 1.5)},
    ),
    "deepseek_v3": _deepseek(),
    "deepseek_v32": _deepseek(),
    "deepseek_v4": Expected(
        GATE,
        FOUR,
        "sqrt_softplus",
        True,
        1.5,
        half_scores=True,
        left_padding=False,
        limits=("fixed by token id", "left padding"),
    ),
    "dots1": Expected(GATE, THREE, "sigmoid", False, 1.5, variants=_if_normed(True, 1.5, "sigmoid")),
    "ernie4_5_moe": Expected(GATE, THREE, "softmax", True),
    "exaone_moe": _deepseek(),
    "flex_olmo": Expected(GATE, FOUR, "softmax", False, variants=_if_normed(True)),
    "gemma4_text": Expected("model.layers.N.router", FOUR, "softmax", True),
    "glm4_moe": _deepseek(),
    "glm4_moe_lite": _deepseek(),
    "glm_moe_dsa": _deepseek(),
    "gpt_oss": _logits_first(ROUTER, half_scores=True),
    "granitemoe": _logits_first("model.layers.N.block_sparse_moe.router"),
    "granitemoe_swa": _logits_first("model.layers.N.block_sparse_moe.router"),
    "granitemoehybrid": _logits_first("model.layers.N.block_sparse_moe.router"),
    "granitemoeshared": _logits_first("model.layers.N.block_sparse_moe.router"),
    "hunyuan_v1_moe": Expected(GATE, FOUR, "softmax", True),
    "hy_v3": Expected(GATE, THREE, "sigmoid", True, 1.5),
    "hy_v4": _deepseek(),
    # shared experts take part in the normalisation, so no rule from one expert's logit to its weight
    "inkling_text": Expected(GATE, FOUR, "other", False, half_scores=True, limits=("no simple rule",)),
    "jamba": Expected("model.layers.N.feed_forward.router", (1, 3), "softmax", False),
    "jetmoe": _logits_first(
        ROUTER,
        interface="sorted",
        implementations=OWN_EXPERTS,
        limits=("attention router",),
    ),
    "kimi_linear": _deepseek(),
    "laguna": Expected(
        GATE,
        THREE,
        "sigmoid",
        True,
        # a soft-cap stands between the logits and their sigmoid
        variants={"soft-cap": Variant({"moe_router_logit_softcapping": 2.0}, "other", False)},
    ),
    "lfm2_moe": Expected(
        "model.layers.N.feed_forward.gate",
        THREE,
        "sigmoid",
        True,
        1.5,
        half_scores=True,
        variants=_if_normed(False, 1.5, "sigmoid")
        | {"no bias": Variant({"use_expert_bias": False}, "sigmoid", True, 1.5)},
    ),
    "llama4_text": Expected(
        "model.layers.N.feed_forward.router",
        FOUR,
        "sigmoid",
        False,
        top_k=2,
        interface="dense",
        implementations=OWN_EXPERTS,
        limits=("every expert runs",),
    ),
    "longcat_flash": Expected(ROUTER, (0, 1), "softmax", False, 1.5, experts=10, implementations=OWN_EXPERTS),
    "mellum": Expected(GATE, FOUR, "softmax", True, variants=_if_normed(False)),
    "mimo_v2_flash": _deepseek(),
    "minimax": Expected(GATE, FOUR, "softmax", True, beams=False, limits=("beam",)),
    "minimax_m2": Expected(GATE, FOUR, "sigmoid", True),
    "minimax_m3_vl_text": Expected(GATE, FOUR, "sigmoid", True),
    "mistral4": Expected(GATE, THREE, "softmax", True, 1.5, half_scores=True, variants=_if_normed(False, 1.5)),
    "mixtral": Expected(GATE, FOUR, "softmax", True),
    "nemotron_h": _deepseek("model.layers.N.mixer.gate", (1, 3)),
    "olmoe": Expected(GATE, FOUR, "softmax", False, variants=_if_normed(True)),
    # two masked softmaxes, one after the other
    "phimoe": Expected(ROUTER, FOUR, "other", False, top_k=2, half_scores=True, limits=("no simple rule",)),
    "qwen2_moe": Expected(GATE, (0, 2, 3), "softmax", False, variants=_if_normed(True)),
    "qwen3_moe": Expected(GATE, (0, 2, 3), "softmax", False, variants=_if_normed(True)),
    "qwen3_next": Expected(GATE, (0, 2, 3), "softmax", True, variants=_if_normed(False)),
    "qwen3_5_moe_text": Expected(GATE, FOUR, "softmax", True),
    "qwen4_exp_text": Expected(GATE, FOUR, "softmax", True, variants=_if_normed(False)),
    "solar_open": _deepseek(layers=FOUR),
    "zaya": Expected(GATE, FOUR, "softmax", False, experts=9, top_k=1, half_scores=True, limits=("skip expert",)),
    "glm4v_moe_text": _deepseek("layers.N.mlp.gate", head="none"),
    "qwen3_vl_moe_text": Expected("layers.N.mlp.gate", FOUR, "softmax", True, head="none"),
    "ernie4_5_vl_moe_text": Expected(
        "layers.N.mlp.text_moe.gate", THREE, "softmax", True, head="none", limits=("tokens of pictures",)
    ),
    "glm5_next_text": _deepseek("layers.N.mlp.gate", head="none"),
    "step3p5": Expected("layers.N.mlp.gate", THREE, "sigmoid", True, head="none", implementations=OWN_EXPERTS),
    "deepseek_ocr2_text": Expected("layers.N.mlp.gate", THREE, "softmax", False, 1.5, head="none"),
    "qwen3_omni_moe_text": Expected(
        "layers.N.mlp.gate", FOUR, "softmax", True, head="none", variants=_if_normed(False)
    ),
    "openai_privacy_filter": Expected(
        "layers.N.mlp.router", FOUR, "softmax", True, 1 / 3, head="classifier", limits=("not causal",)
    ),
}

# families that are refused, and the words that must be in the reason
REFUSED = {
    "doge": ("mixes tokens across the batch", "Use a decoder-only MoE"),
    "switch_transformers": ("encoder-decoder", "one-hot dispatch"),
    "nllb-moe": ("encoder-decoder", "only numbers 0 and 1"),
}

# which columns of the matrix there are, in the order of the table
CHECKS = {
    "rule": "probed scoring, renormalisation, scaling, E and K equal those written down by hand",
    "no-op": "no strategy, and live taps with a delta of 0: the same bits in each experts implementation",
    "delta": "experts and weights under a delta equal the family's rule written out independently, in fp32 and bf16",
    "selection": "fewer and more experts per token: the experts' output equals a sum of single experts",
    "gradient": "gradient to the delta equals finite differences in fp64, and agrees between experts implementations",
    "generate": "cached generation under a delta equals full recompute",
    "padding": "the same in a left-padded batch, row by row",
    "beams": "beam search under a delta, a different one for each sequence, equals beam search without a cache",
    "bits": "a live delta of 0 keeps every bit in bf16; rows beside an edited one keep theirs, in fp32 and bf16",
    "masks": "masked experts never reach the experts; a full mask keeps every bit; ranks are the family's order",
    "c3po": "scores put in at the last prompt token reach the experts by the family's rule, and no other token is "
    "touched; cached generation, left-padded too, equals full recompute",
    "trace": "no hook, no attribute and no changed weight afterwards, also after a failure",
}
