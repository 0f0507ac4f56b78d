"""What do C3PO's surrogates and options change on the pocket model? A table with paired intervals and costs.

    python demos/c3po_ablations.py --out docs/c3po.md     about half an hour on one core

Questions are asked alone, without solved examples before them. References are the shipped set: other questions, from
a split that training never saw. Surrogates are compared on test questions; options were varied on dev questions of
three sets, and none was chosen by them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import ttrouting as ttr
from ttrouting.cli.paired import Paired
from ttrouting.pocket.measure import LONGEST_ANSWER
from ttrouting.pocket.skills import Example, is_correct, sample

Way = Callable[[tuple[str, ...]], ttr.RoutingStrategy]  # from the questions' own answers, which only an oracle reads

SETS = ("subtract", "reverse", "count", "units", "sequence")  # in letters, which they were never trained in
VARIED = ("subtract", "reverse", "count")
TRAINED = ("add", "logic", "time")  # in letters as well
BATCH = 20
EVERYWHERE: dict[str, Any] = {"scope": "all", "layers": "all", "core_experts": 1.0, "k": 8}


@dataclass(frozen=True)
class Result:
    """Answers of one way to one set."""

    right: list[bool]
    accepted: int
    seconds: float


def ask(model: Any, tokenizer: Any, questions: Sequence[Example], way: Way | None, no_harm: bool) -> Result:
    """Greedy answers, `BATCH` questions at a time."""
    right: list[bool] = []
    accepted, began = 0, perf_counter()
    for start in range(0, len(questions), BATCH):
        asked = questions[start : start + BATCH]
        # the space belongs to the prompt, so that the last prompt token predicts the first digit
        inputs = tokenizer([f"{q.prompt} " for q in asked], return_tensors="pt", padding=True)
        options = {"do_sample": False, "max_new_tokens": LONGEST_ANSWER}
        if way is None:
            with torch.no_grad():
                ids = model.generate(**inputs, **options)
        else:
            strategy = way(tuple(f"{q.answer}\n" for q in asked))
            with ttr.adapt(model, strategy, tokenizer=tokenizer, no_harm=no_harm) as adapted:
                ids = adapted.generate(**inputs, **options)
                accepted += sum(s.strategies["c3po"]["outcome"] == "accepted" for s in adapted.report.sequences)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [is_correct(text, question) for text, question in zip(texts, asked, strict=True)]
    return Result(right, accepted, perf_counter() - began)


def interval(base: Sequence[bool], other: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference, question by question."""
    change = np.subtract(other, base, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(change), (10_000, len(change)))
    low, high = np.percentile(change[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)


def c3po(**options: Any) -> Way:
    """C3PO with these options; an oracle gets the answers."""
    return lambda labels: ttr.C3PO(**options, labels=labels if options.get("surrogate") == "oracle" else None)


SURROGATES = ("mode_finding", "kernel_regression", "ngd", "oracle")
MAIN: dict[str, tuple[Way, bool]] = {
    **{f"{name}, last prompt token": (c3po(surrogate=name), True) for name in SURROGATES},
    **{f"{name}, all tokens": (c3po(surrogate=name, **EVERYWHERE), True) for name in SURROGATES},
    "ngd, all tokens, use=all": (c3po(surrogate="ngd", use="all", **EVERYWHERE), True),
    "ngd, all tokens, use=all, no_harm=False": (c3po(surrogate="ngd", use="all", **EVERYWHERE), False),
}


CONTROL = {name: way for name, way in MAIN.items() if name.startswith("ngd")}


def varied() -> dict[str, tuple[Way, bool]]:
    """One option at a time, around NGD on all tokens with all references."""
    centre = {**EVERYWHERE, "use": "all"}
    changes: list[tuple[str, dict[str, Any]]] = [("k=8, 10 steps, Gaussian, all layers, all experts", {})]
    changes += [(f"k={k}", {"k": k}) for k in (1, 3, 16)]
    changes += [(f"{steps} steps", {"steps": steps}) for steps in (3, 5, 20)]
    changes += [(kernel, {"kernel": kernel}) for kernel in ("linear", "polynomial", "matern")]
    changes += [(f"layers={layers}", {"layers": layers}) for layers in ("last:1", "last:3", "last:5")]
    changes += [(f"core_experts={share}", {"core_experts": share}) for share in (0.125, 0.3125)]
    changes += [("max_similarity=1", {"max_similarity": 1.0}), ("use=successful", {"use": "successful"})]
    return {name: (c3po(**{**centre, **change}), True) for name, change in changes}


def compare(
    model: Any, tokenizer: Any, skills: Sequence[str], split: str, n: int, ways: dict[str, tuple[Way, bool]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """A Markdown table, one line for each way, and the same as plain values."""
    questions = {skill: sample(skill, "letters", split, n, 7) for skill in skills}
    base = {skill: ask(model, tokenizer, asked, None, True) for skill, asked in questions.items()}
    spent = sum(r.seconds for r in base.values())
    shares = " | ".join(f"{np.mean(r.right):.2f}" for r in base.values())
    lines = [
        f"| | {' | '.join(skills)} | all sets | 95 % of the difference | won, lost | p | accepted | ms a question |",
        "|---" * (len(skills) + 7) + "|",
        f"| base | {shares} | {np.mean(_all(base)):.2f} | | | | | {1000 * spent / (n * len(skills)):.0f} |",
    ]
    facts: list[dict[str, Any]] = [{"way": "base", "split": split, "right": {s: r.right for s, r in base.items()}}]
    for name, (way, no_harm) in ways.items():
        found = {skill: ask(model, tokenizer, asked, way, no_harm) for skill, asked in questions.items()}
        paired, (low, high) = Paired.of(_all(base), _all(found)), interval(_all(base), _all(found))
        spent, kept = sum(r.seconds for r in found.values()), sum(r.accepted for r in found.values())
        shares = " | ".join(f"{np.mean(r.right):.2f}" for r in found.values())
        lines.append(
            f"| {name} | {shares} | {np.mean(_all(found)):.2f} | "
            f"{100 * low:+.0f} to {100 * high:+.0f} | {paired.won}, {paired.lost} | {paired.p_value:.2g} | "
            f"{kept / paired.n:.0%} | {1000 * spent / paired.n:.0f} |"
        )
        print(lines[-1], flush=True)
        facts.append(
            {
                "way": name,
                "split": split,
                "right": {s: r.right for s, r in found.items()},
                "interval": (low, high),
                "won": paired.won,
                "lost": paired.lost,
                "p": paired.p_value,
                "accepted": kept,
                "seconds": spent,
            }
        )
    return lines, facts


def _all(results: dict[str, Result]) -> list[bool]:
    return [one for result in results.values() for one in result.right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="test questions a set; dev questions are three fifths")
    parser.add_argument("--out", type=Path, help="write the tables there, and the answers beside them as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains nothing from more
    model, tokenizer = ttr.load_pocket()
    test, facts = compare(model, tokenizer, SETS, "test", options.n, MAIN)
    control, held = compare(model, tokenizer, TRAINED, "test", options.n, CONTROL)
    dev, more = compare(model, tokenizer, VARIED, "dev", max(1, 3 * options.n // 5), varied())
    tables = {"Surrogates": test, "Where nothing is wrong": control, "Options": dev}
    text = "\n".join(line for title, lines in tables.items() for line in (f"### {title}", "", *lines, ""))
    if options.out is None:
        print(text)
        return
    options.out.write_text(text)
    options.out.with_suffix(".json").write_text(json.dumps(facts + held + more, indent=1))


if __name__ == "__main__":
    main()
