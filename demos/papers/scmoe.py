"""SCMoE: "Unchosen Experts Can Contribute Too", arXiv 2405.14507.

    python -m demos.papers.scmoe
    python -m demos.papers.scmoe --tiny

Model: Mixtral 8x7B, `mistralai/Mixtral-8x7B-v0.1`, in bf16.
Task: GSM8K, greedy, at most 512 tokens as in the released code. `--tasks` for StrategyQA (with `--data-dir`), MBPP
and HumanEval (with two consents, see docs/evaluation.md).
Prompt: the paper's is not known here. The released code reads the number after "The answer is", so GSM8K's is
lm-eval's `gsm8k_cot`, eight worked examples that end so; the others are those of docs/evaluation.md.
Options: the weak routing is the expert of rank 2 alone; alpha 0.1, beta 0.5 (the paper tries 0.1 to 0.9).
Published: greedy decoding and SCMoE, both in percent.

The paper's DeepSeekMoE (`deepseek-ai/deepseek-moe-16b-base`: GSM8K 18.95 -> 20.77, StrategyQA 60.41 -> 62.99, MBPP
35.20 -> 37.20, HumanEval 26.83 -> 28.05) comes with code of its own, which is not run here.
"""

from __future__ import annotations

from demos.papers.reproduce import Paper, Place
from ttrouting.strategies.scmoe import SCMoE
from ttrouting.strategy import Strategy

MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


def variants(place: Place) -> dict[str, list[Strategy]]:
    """What is compared with base."""
    return {"scmoe": [SCMoE(alpha=0.1, beta=0.5, weak="rank:2")]}


PAPER = Paper(
    title="SCMoE, arXiv 2405.14507",
    models={
        MIXTRAL: {
            "model_type": "mixtral",
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    },
    tasks=("gsm8k_cot", "strategyqa", "mbpp", "humaneval"),
    variants=variants,
    published={
        (MIXTRAL, "gsm8k_cot", "scmoe"): "61.79 -> 66.94",
        (MIXTRAL, "strategyqa", "scmoe"): "72.83 -> 76.29",
        (MIXTRAL, "mbpp", "scmoe"): "46.20 -> 48.80",
        (MIXTRAL, "humaneval", "scmoe"): "33.54 -> 41.46",
    },
    cost="1.30x the time of greedy decoding",
    max_new_tokens=512,
)

if __name__ == "__main__":
    PAPER.main(__doc__)
