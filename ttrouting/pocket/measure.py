"""How well does the pocket model do, and which experts does it use?

Greedy answers, exact match with a Wilson interval, and the share of tokens each expert gets.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttrouting.pocket.skills import few_shot_prompt, is_correct, sample

POOL = 600  # solved examples to draw contexts from
LONGEST_ANSWER = 24  # tokens; the longest answer line of any skill is shorter
Pair = tuple[str, str]  # skill, dialect
_Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """Exact match of one skill in one dialect: `correct` of `n` questions."""

    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in 0..1."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        p, n, z2 = self.accuracy, self.n, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5 / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy completions of `prompts`, run as one left-padded batch, without the prompts."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    out = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    skill: str,
    dialect: str,
    *,
    split: str = "test",
    n: int = 100,
    shots: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> Score:
    """Exact match on `n` different questions of `split`.

    With `shots` > 0 each question follows that many solved `dev` examples of the same skill and
    dialect, drawn for each question from a pool of `POOL` (a smaller skill has not many more).
    """
    questions = sample(skill, dialect, split, n, seed)
    pool = sample(skill, dialect, "dev", POOL, seed) if shots else []
    draw = random.Random(seed)
    prompts = [few_shot_prompt(draw.sample(pool, shots), question) for question in questions]
    correct = 0
    for start in range(0, n, batch_size):
        completions = complete(model, tokenizer, prompts[start : start + batch_size])
        asked = questions[start : start + batch_size]
        correct += sum(is_correct(c, q) for c, q in zip(completions, asked, strict=True))
    return Score(correct, n)


@torch.inference_mode()
def expert_load(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Share of the chosen expert slots that each expert got on `texts`: `[L, E]`, rows sum to 1.

    Padding is left out. An expert with share 0 is dead on these texts.
    """
    batch = tokenizer(list(texts), return_tensors="pt", padding=True).to(model.device)
    logits = model(**batch, output_router_logits=True).router_logits  # L x [B*T, E]
    real = batch["attention_mask"].reshape(-1).bool()  # [B*T]
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    rows = []
    for layer in logits:
        chosen = layer[real].topk(k, dim=-1).indices.reshape(-1)
        rows.append(torch.bincount(chosen, minlength=experts) / chosen.numel())
    return torch.stack(rows).cpu()


def loads_by_pair(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair], n: int = 32, seed: int = 0
) -> dict[Pair, torch.Tensor]:
    """`expert_load` of each `(skill, dialect)` on `n` solved test questions."""
    return {
        pair: expert_load(model, tokenizer, [e.prompt + e.completion for e in sample(*pair, "test", n, seed)])
        for pair in pairs
    }


def mutual_information(loads: Sequence[torch.Tensor]) -> torch.Tensor:
    """What an expert tells of the group that a token belongs to, in bits, by layer: `[L]`.

    Args:
        loads: `[L, E]` of each group; groups weigh the same. 0 where all groups use the same experts; at most the
            logarithm of their number.
    """
    each = torch.stack(list(loads))  # [groups, L, E]
    return _bits(each.mean(0)) - _bits(each).mean(0)


def _bits(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.clamp_min(1e-12).log2()).sum(-1)
