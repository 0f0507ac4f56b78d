"""Rerouting: "Rewiring Experts on the Fly", arXiv 2510.14853.

    HF_ALLOW_CODE_EVAL=1 python -m demos.papers.rerouting --confirm-run-unsafe-code
    HF_ALLOW_CODE_EVAL=1 python -m demos.papers.rerouting --confirm-run-unsafe-code --tiny

Models: OLMoE, Qwen1.5-MoE or DeepSeek-V2-Lite (`--model`). The paper's checkpoints of these are not known here: the
base ones are taken.
Task: HumanEval, pass@1, greedy. The paper's prompt is not known here: lm-eval's, the head of the function alone.
Options: `Rerouting.preset("paper")`, five steps of 0.05 on the whole context, and again every 128 tokens. The
optimiser (Adam) and the share of layers (the most confident half) are not published.
Published: differences alone, +5.5 points on HumanEval with OLMoE. HumanEval has 164 problems: that is nine of them.

Programs that the model writes are run; see docs/evaluation.md.
"""

from __future__ import annotations

from demos.papers.reproduce import Paper, Place
from ttrouting.strategies.rerouting import Rerouting
from ttrouting.strategy import Strategy

OLMOE, QWEN, DEEPSEEK = "allenai/OLMoE-1B-7B-0924", "Qwen/Qwen1.5-MoE-A2.7B", "deepseek-ai/DeepSeek-V2-Lite"
CODE = "+3.6 to +6.7 points on code, over the three models"


def variants(place: Place) -> dict[str, list[Strategy]]:
    """What is compared with base."""
    return {"rerouting": [Rerouting.preset("paper")]}


PAPER = Paper(
    title="Rerouting, arXiv 2510.14853",
    models={
        OLMOE: {"model_type": "olmoe", "num_hidden_layers": 4, "num_experts": 64, "num_experts_per_tok": 8},
        QWEN: {
            "model_type": "qwen2_moe",
            "num_hidden_layers": 4,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 64,
        },
        DEEPSEEK: {
            "model_type": "deepseek_v2",
            "num_hidden_layers": 4,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "topk_method": "greedy",
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    },
    tasks=("humaneval",),
    variants=variants,
    published={
        (OLMOE, "humaneval", "rerouting"): f"+5.5 points ({CODE})",
        (QWEN, "humaneval", "rerouting"): CODE,
        (DEEPSEEK, "humaneval", "rerouting"): CODE,
    },
    cost="1.88x the time (20.12 s against 10.71 s)",
)

if __name__ == "__main__":
    PAPER.main(__doc__)
