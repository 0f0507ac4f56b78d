"""Dynamic-k: "Harder Tasks Need More Experts", arXiv 2403.07652, and its relatives, put on models trained without it.

    python -m demos.papers.dynamic_k
    python -m demos.papers.dynamic_k --tiny

Models: `Qwen/Qwen3-30B-A3B` (8 of 128 experts) or `mistralai/Mixtral-8x7B-v0.1` (2 of 8): `--model`.
Task: GSM8K, greedy, lm-eval's prompt with five worked examples. The source of Qwen3's published numbers names neither
task nor prompt here, Mixtral's no prompt.
Options: the rules top-p, relative (NAEE), sensitivity (AdapMoE) and entropy (DynMoLE), each with the threshold that
gives three quarters of K on sixteen GSM8K train questions; and half of K for every token.
Published: what became of models that were trained with all K experts; no number is known here for the other rules.

The first paper trains a model with top-p of p = 0.4 (average 41.6 -> 42.3 at 1.76 experts a token instead of 2);
that needs its model. Put on others, this is a method of cost, and published retrofits lose accuracy.
"""

from __future__ import annotations

from demos.papers.reproduce import Paper, Place
from ttrouting.calibration import calibrate
from ttrouting.sites import find_sites
from ttrouting.strategies.dynamic_k import RULES, DynamicK
from ttrouting.strategy import Strategy

QWEN, MIXTRAL = "Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1"
TEXTS, SHARE = 16, 0.75  # calibration questions; of K


def variants(place: Place) -> dict[str, list[Strategy]]:
    """What is compared with base."""
    k = max(site.top_k for site in find_sites(place.model))
    texts = [f"{d.instances[0].args[0]} {d.target}" for d in place.unscored("gsm8k", 2 if place.tiny else TEXTS)]
    found: dict[str, list[Strategy]] = {"half_of_k": [DynamicK(p=1e-6, k_min=k // 2)]}  # p asks for one
    for rule in RULES:
        options = {"k_min": 1} if k == 2 else {}  # `entropy` keeps two where nothing else is said
        found[rule] = [calibrate(place.model, place.tokenizer, texts, mean_k=SHARE * k, rule=rule, **options)]
    return found


MIXTRAL_LOSES = "worse than base for p of 0.6 and less"
PAPER = Paper(
    title="Dynamic-k, arXiv 2403.07652 and relatives",
    models={
        QWEN: {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        MIXTRAL: {
            "model_type": "mixtral",
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    },
    tasks=("gsm8k",),
    variants=variants,
    published={
        (QWEN, "gsm8k", "top_p"): "89.77 -> 87.87 at about 6 experts a token",
        (QWEN, "gsm8k", "half_of_k"): "89.77 -> 81.88 at 4 experts a token",
        (MIXTRAL, "gsm8k", "top_p"): MIXTRAL_LOSES,
    },
    cost="nothing but the experts that are left out",
)

if __name__ == "__main__":
    PAPER.main(__doc__)
