"""Does adapting routing help where the pocket model knows a skill but not its spelling?

Each shifted set: a skill trained in digits only, asked in letters after six solved examples. Greedy answers,
exact match, base beside Rerouting with and without the no-harm rule, paired by question.

    python demos/shifted_sets.py --n 80
"""

import argparse

import torch

import ttrouting as ttr
from ttrouting.cli.trial import QuestionSet
from ttrouting.evaluation.statistics import Paired
from ttrouting.pocket.measure import complete
from ttrouting.pocket.skills import SKILLS, is_correct, shifted_pairs

STRATEGY = {"steps": 10, "lr": 0.1, "layers": "all", "loss_on": r"A:(.*\n)", "interval": None}


def right(model, tokenizer, asked: QuestionSet) -> list[bool]:
    """Which questions a model, adapted or not, gets right."""
    return [is_correct(c, q) for c, q in zip(complete(model, tokenizer, asked.prompts), asked.questions, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=80, help="test questions a set")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    model, tokenizer = ttr.load_pocket()
    print("| in letters | six examples | with Rerouting | won, lost | p | without no-harm | won, lost | p |")
    print("|---|---|---|---|---|---|---|---|")
    for skill, dialect in ((s, d) for s, d in shifted_pairs() if SKILLS[s].trained_dialects):
        asked = QuestionSet.draw(skill, dialect, args.n, 6, args.seed)
        base = right(model, tokenizer, asked)
        cells = [skill, f"{sum(base) / args.n:.2f}"]
        for no_harm in (True, False):
            with ttr.adapt(model, ttr.Rerouting(**STRATEGY), no_harm=no_harm, tokenizer=tokenizer) as adapted:
                paired = Paired.of(base, right(adapted, tokenizer, asked))
            cells += [f"{paired.second:.2f}", f"{paired.won}, {paired.lost}", f"{paired.p_value:.2g}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
