"""What could contrast win on worked steps at best? Every weak routing, strength and choice of tokens, with hindsight.

    python -m demos.scmoe_room             the figures in docs/results.md; twelve minutes
    python -m demos.scmoe_room --n 50      fewer dev questions a set

Each right answer is read after six solved questions, once as the model routes and once by each weak routing; greedy
decoding gives it exactly where each of its tokens scores highest. Contrast then acts on all tokens, or only where the
model's two best are close. Per weak routing the best of these settings is printed, chosen on the very questions it is
counted on: more than any choice on other questions could promise.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ttrouting as ttr
from ttrouting.pocket.skills import few_shot_prompt, sample
from ttrouting.strategies.scmoe import contrast

SETS = (("word", "digits"), ("word", "letters"))  # those with worked steps that the model fails most
BETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
MARGINS = (0.2, 0.5, 1.0, 2.0, float("inf"))  # contrast where the two best logits differ by less
BATCH = 32

Rule = dict[int, int | None]  # layer to the rank of its only expert, from 1; None: any expert, at random


def weak_routings(layers: int) -> dict[str, Rule]:
    """By name: one expert in all layers, or in one of them."""
    everywhere = {
        f"rank {rank}" if rank else "random": dict.fromkeys(range(layers), rank) for rank in (1, 2, 3, 4, 8, 16, None)
    }
    single = {f"rank {rank}, layer {layer} alone": {layer: rank} for rank in (1, 2) for layer in range(layers)}
    return everywhere | single


class Weak:
    """Leaves a token one expert with its own score, in the layers of `rule`."""

    def __init__(self, model: Any) -> None:
        self.rule: Rule = {}
        self.draw = torch.Generator().manual_seed(0)
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.register_forward_hook(lambda _, args, out, layer=layer: self.route(layer, *out))

    def route(self, layer: int, logits: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self.rule:
            return logits, weights, chosen
        scores, rank = logits.softmax(-1), self.rule[layer]
        if rank is None:
            one = torch.randint(scores.shape[1], (len(scores), 1), generator=self.draw)
        else:
            one = scores.argsort(-1, descending=True)[:, rank - 1 : rank]
        return logits, scores.gather(1, one), one


def batches(tokenizer: Any, skill: str, dialect: str, n: int) -> Iterator[tuple[Tensor, list[slice]]]:
    """Token ids `[B, T]`, padded at the end, and where each row's answer is."""
    draw, solved = random.Random(0), sample(skill, dialect, "dev", 400, seed=1)
    rows = []
    for question in sample(skill, dialect, "dev", n):
        prompt = few_shot_prompt(draw.sample([one for one in solved if one.prompt != question.prompt], 6), question)
        length = len(tokenizer(prompt).input_ids)
        rows.append((tokenizer(prompt + question.completion, return_tensors="pt").input_ids[0], length))
    for start in range(0, n, BATCH):
        some = rows[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in some], batch_first=True)
        yield ids, [slice(length, len(row)) for row, length in some]


def answer_logits(model: Any, ids: Tensor, answers: list[slice]) -> list[Tensor]:
    """`[answer's tokens, V]` of each row: what predicts them."""
    logits = model(input_ids=ids, use_cache=False).logits
    return [row[answer.start - 1 : answer.stop - 1] for row, answer in zip(logits, answers, strict=True)]


@torch.inference_mode()
def count(model: Any, tokenizer: Any, weak: Weak, skill: str, dialect: str, n: int) -> tuple[int, Counter[Any]]:
    """How many are right without contrast; and by (weak routing, beta, margin, won or lost) how many change."""
    right, changed = 0, Counter[Any]()
    for ids, answers in batches(tokenizer, skill, dialect, n):
        wanted = [row[answer] for row, answer in zip(ids, answers, strict=True)]
        weak.rule = {}
        strong = answer_logits(model, ids, answers)
        usual = [z.argmax(-1) == w for z, w in zip(strong, wanted, strict=True)]
        right += sum(bool(hits.all()) for hits in usual)
        for name, weak.rule in weak_routings(len(model.model.layers)).items():
            for z, other, w, was in zip(strong, answer_logits(model, ids, answers), wanted, usual, strict=True):
                first, second = z.topk(2).values.unbind(-1)
                for beta in BETAS:
                    hits = contrast(z, other, 0.1, beta).argmax(-1) == w
                    for margin in MARGINS:
                        now = bool(hits.where(first - second < margin, was).all())
                        changed[name, beta, margin, now] += now != bool(was.all())
    return right, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=600, help="dev questions of each set")
    n = parser.parse_args().n
    torch.set_num_threads(1)
    model, tokenizer = ttr.load_pocket()
    weak = Weak(model)
    for skill, dialect in SETS:
        right, changed = count(model, tokenizer, weak, skill, dialect, n)
        print(f"\n{skill}_{dialect}: {right} of {n} right without contrast\n")
        print("| weak routing | beta | where the margin is below | won | lost |\n|---|---|---|---|---|")
        for name in weak_routings(len(model.model.layers)):
            won, lost, beta, margin = max(
                ((changed[name, b, m, True], changed[name, b, m, False], b, m) for b in BETAS for m in MARGINS),
                key=lambda setting: setting[0] - setting[1],
            )
            print(f"| {name} | {beta} | {margin} | {won} | {lost} |")


if __name__ == "__main__":
    main()
