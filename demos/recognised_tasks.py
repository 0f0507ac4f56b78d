"""Which task is a prompt of? The classifier of task deltas beside the vote of nearest references, measured.

    python -m demos.recognised_tasks            the table of docs/task_delta.md
    python -m demos.recognised_tasks --n 20     more questions of each task

A prompt counts as known where the right task has at least 0.8, of the probability or of the vote; as mistaken where
another one has.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import numpy as np
import torch

import ttrouting as ttr
from ttrouting.pathways import encode
from ttrouting.pocket.skills import Example, few_shot_prompt, sample, shifted_pairs, trained_pairs
from ttrouting.refsets.company import embedded
from ttrouting.refsets.kernels import weights
from ttrouting.target import Target

CERTAIN = 0.8
PAIRS = trained_pairs() + shifted_pairs()


def prompts(n: int, kind: str, draw: random.Random) -> tuple[list[str], list[str]]:
    """Test questions of every task in one kind of prompt, and their tasks."""
    texts, tasks = [], []
    shots: Sequence[Example]
    for skill, dialect in PAIRS:
        for question in sample(skill, dialect, "test", n):
            same = sample(skill, dialect, "dev", 6)
            other = [one for pair in draw.sample(PAIRS, 6) for one in sample(*pair, "dev", 1)]
            shots = {"six of its task": same, "three of any": other[:3], "six of any": other}.get(kind, [])
            texts.append(few_shot_prompt(shots, question) + " " * (kind != "no blank at the end"))
            tasks.append(f"{skill}/{dialect}")
    return texts, tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=6, help="questions of each task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = ttr.load_pocket()
    strategy, target = ttr.TaskDelta(), Target(model, ttr.find_sites(model), tokenizer)
    references, bank = strategy.references, strategy.bank
    names = np.array(list(bank.tasks))
    print("| prompt | known, mistaken: vote of 8 nearest | classifier | cosine to the nearest |")
    print("|---|---|---|---|")
    for kind in ("the question alone", "no blank at the end", "six of its task", "three of any", "six of any"):
        texts, tasks = prompts(options.n, kind, random.Random(0))
        rows, _ = encode(tokenizer, texts, [""] * len(texts))
        query = embedded(target, rows, bank.head, 32)
        near = references.search(query, 8, use="all", max_similarity=1.0)
        vote = np.zeros((len(texts), len(names)))
        for row, (numbers, each) in enumerate(zip(near.index, weights("gaussian", near), strict=True)):
            for number, weight in zip(numbers, each, strict=True):
                vote[row, names == references.record(int(number)).task] += weight
        told = []
        for shares in (vote, bank.classifier.probabilities(references.compared(query))):
            right, certain = names[shares.argmax(1)] == np.array(tasks), shares.max(1) >= CERTAIN
            told.append(f"{(right & certain).mean():.3f}, {(~right & certain).mean():.3f}")
        cosine = near.similarity[:, 0]
        print(f"| {kind} | {told[0]} | {told[1]} | {cosine.min():.2f} to {cosine.max():.2f} |")


if __name__ == "__main__":
    main()
