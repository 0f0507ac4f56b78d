"""Expert masks: EASY-EP, "Domain Specific Pruning of Large Mixture-of-Experts Models", arXiv 2504.06792.

    python -m demos.papers.expert_mask
    python -m demos.papers.expert_mask --tiny

Model: DeepSeek-R1, `deepseek-ai/DeepSeek-R1`, 671B parameters in its own fp8: a node of eight large GPUs.
Task: GSM8K, greedy, lm-eval's prompt with five worked examples; demonstrations from its train split. The paper has
domains and prompts of its own, of which AIME, GPQA, LiveCodeBench and agents are in its code.
Options: 25 demonstrations, each a question with the model's own answer; half of the experts stay (256 -> 128).
Published: a mean over the paper's domains. A mask of another domain destroys quality: that of mathematics on an agent
task 40.51 -> 3.47.
"""

from __future__ import annotations

from demos.papers.reproduce import TINY_TOKENS, Paper, Place
from ttrouting.cli.models import encode
from ttrouting.strategies.expert_mask import ExpertMask
from ttrouting.strategy import Strategy

R1 = "deepseek-ai/DeepSeek-R1"
DEMONSTRATIONS, LONGEST = 25, 4096  # tokens of the model's own answer, our choice


def demonstrations(place: Place, n: int, longest: int) -> list[str]:
    """Questions that are not scored, each with what the model itself answers."""
    texts = []
    for document in place.unscored("gsm8k", n):
        inputs = encode(place.model, place.tokenizer, [document.instances[0].args[0]])
        ids = place.model.generate(**inputs, do_sample=False, max_new_tokens=longest)
        texts.append(place.tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def variants(place: Place) -> dict[str, list[Strategy]]:
    """What is compared with base."""
    texts = demonstrations(place, *((2, TINY_TOKENS) if place.tiny else (DEMONSTRATIONS, LONGEST)))
    return {"expert_mask": [ExpertMask.from_demonstrations(place.model, place.tokenizer, texts, keep=0.5)]}


PAPER = Paper(
    title="EASY-EP, arXiv 2504.06792",
    models={
        R1: {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 4,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
    },
    tasks=("gsm8k",),
    variants=variants,
    published={(R1, "gsm8k", "expert_mask"): "67.20 -> 66.55, mean over the paper's domains"},
    cost="none; the paper saves memory by leaving masked experts out, here they stay loaded",
    max_new_tokens=LONGEST,
    dtype="auto",
)

if __name__ == "__main__":
    PAPER.main(__doc__)
