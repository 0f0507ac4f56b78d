"""How much room has routing on each set of the pocket model? Three oracles; none of them is a method.

    python -m demos.study.oracles                                 shifted sets and controls; goes on where it was left
    python -m demos.study.oracles --sets reverse_letters --shots 0 --n 100

own label    a delta optimised on the question's own answer. A hundred free numbers can force almost any short answer,
             so this alone proves nothing.
wrong label  the same optimisation towards another question's answer of the set: how often is that forced as well?
transfer     ONE delta for the set, fitted on labelled dev questions, scored on test questions: what it gains over
             base is what routing can do here and no answer gave away.

Prompts are those of the evaluation, answers are greedy and matched exactly.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import ttrouting as ttr
from demos.study.earlier import RESULTS, earlier
from demos.study.place import OUT, SEED, Asked, Place
from demos.study.plan import CONTROLS, SEARCHES, SHIFTED, SHOTS
from demos.study.run import chosen_sets
from ttrouting.cli.output import Output
from ttrouting.evaluation.files import write_json
from ttrouting.evaluation.question import hardware, versions
from ttrouting.evaluation.statistics import Paired
from ttrouting.pocket.measure import LONGEST_ANSWER
from ttrouting.pocket.skills import parse_answer
from ttrouting.shared_fit import fit_shared_delta
from ttrouting.strategy import Strategy

BATCH = 25
FITTED_ON = 96  # labelled dev questions that the transfer oracle learns from
FORCED = 200  # questions that a delta of their own is optimised for: half a second each after solved examples
FIT: dict[str, Any] = {"steps": 60, "lr": 0.1, "batch_size": 32, "held_out": 0.1}
# one delta on the logits of all tokens, layers and experts: as much freedom as the transfer oracle's has
DESCENT: dict[str, Any] = {"surrogate": "oracle", "scope": "all", "layers": "all", "core_experts": 1.0}

Way = Callable[[Sequence[int]], Strategy]  # for questions by their numbers


def answers(place: Place, asked: Sequence[Asked], way: Way | None = None) -> list[str]:
    """Greedy answer lines to all questions, `BATCH` at a time. No oracle is held to the no-harm rule."""
    found: list[str] = []
    for start in range(0, len(asked), BATCH):
        numbers = range(start, min(start + BATCH, len(asked)))
        inputs = place.tokenizer([asked[i].prompt for i in numbers], return_tensors="pt", padding=True)
        strategies = [] if way is None else [way(numbers)]
        with ttr.adapt(place.model, strategies, no_harm=False, tokenizer=place.tokenizer) as adapted, torch.no_grad():
            ids = adapted.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        texts = place.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += map(parse_answer, texts)
    return found


def towards(asked: Sequence[Asked], labels: Sequence[str]) -> Way:
    """Optimise each question's delta towards its label."""
    return lambda numbers: ttr.C3PO(**DESCENT, labels=tuple(asked[i].completed(labels[i]) for i in numbers))


def wrong_labels(right: Sequence[str], seed: int = SEED) -> list[str]:
    """For each question the answer of another one that differs from its own.

    Raises:
        ConfigError: all answers are the same.
    """
    draw, known = random.Random(seed), sorted(set(right))
    if len(known) < 2:
        raise ttr.ConfigError(f"All {len(right)} answers are {known}: no other is wrong. Ask more questions.")
    shuffled = list(right)
    draw.shuffle(shuffled)  # frequent answers stay frequent
    return [
        wrong if wrong != answer else draw.choice([other for other in known if other != answer])
        for wrong, answer in zip(shuffled, right, strict=True)
    ]


def transfer(place: Place, name: str, pairs: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """One delta for a set from labelled dev questions, and how well it fits them."""
    learned = place.questions(name, "dev", pairs)
    labelled = [(q.prompt, q.completion) for q in learned]
    fit = fit_shared_delta(place.model, place.tokenizer, labelled, seed=SEED, **FIT)
    losses = {part: [getattr(fit, part).before.loss, getattr(fit, part).after.loss] for part in ("fit", "held")}
    return fit.delta, {**FIT, "pairs": len(labelled), "step": fit.step, "curve": fit.curve, "loss": losses}


def measure(place: Place, name: str, pairs: int = FITTED_ON) -> dict[str, Any]:
    """Base and the three oracles on a set's first test questions: what each got right, as plain values.

    Those that see a label are asked the first `FORCED` of them.
    """
    asked = place.questions(name, "test", place.n)
    labels = [q.answer for q in asked]
    wrong = wrong_labels(labels)
    seconds: dict[str, float] = {}
    said: dict[str, list[str]] = {}
    began = perf_counter()
    delta, fitted = transfer(place, name, pairs)
    seconds["fit"] = perf_counter() - began
    ways: dict[str, Way | None] = {
        "base": None,
        "own_label": towards(asked, labels),
        "wrong_label": towards(asked, wrong),
        "transfer": lambda _: ttr.StaticRouting(delta=delta),
    }
    for kind, way in ways.items():
        began = perf_counter()
        said[kind] = answers(place, asked[:FORCED] if kind.endswith("label") else asked, way)
        seconds[kind] = perf_counter() - began
    right = {kind: _matches(texts, labels) for kind, texts in said.items()}
    return {
        "set": name,
        "shots": place.shots,
        "n": len(asked),
        "seed": SEED,
        "fingerprint": place.fingerprint,
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
        "descent": DESCENT,
        "transfer_fit": fitted,
        "right": {kind: bits(one) for kind, one in right.items()},
        # how often each gives the wrong answer that was asked for; base by chance
        "forced": {kind: bits(_matches(said[kind], wrong)) for kind in ("base", "wrong_label")},
        "paired": {
            kind: asdict(Paired.of(right["base"][: len(one)], one)) for kind, one in right.items() if kind != "base"
        },
        "seconds": seconds,
    }


def bits(right: Sequence[bool]) -> str:
    """One 0 or 1 a question."""
    return "".join("01"[one] for one in right)


def share(right: str) -> float:
    """Of ones, in 0..1."""
    return right.count("1") / len(right)


def _matches(texts: Sequence[str], labels: Sequence[str]) -> list[bool]:
    """Of as many labels as there are texts."""
    return [text == label for text, label in zip(texts, labels, strict=False)]


def file_of(place: Place, name: str) -> Path:
    """Where a set's oracles are kept."""
    return place.folder / "oracles" / f"{name}.json"


def told(name: str, shots: int, found: dict[str, Any]) -> str:
    """One line on a set."""
    words = "  ".join(f"{kind} {100 * share(one):.0f} %" for kind, one in found["right"].items())
    forced = share(found["forced"]["wrong_label"])
    return f"{name}, {shots} examples: {words}  wrong answer forced {100 * forced:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shots", type=int, choices=SHOTS, help="solved examples before each question; default: both"
    )
    parser.add_argument("--sets", default=",".join(SHIFTED + CONTROLS), metavar="NAME,...")
    parser.add_argument("--n", type=int, default=500, help="test questions of each set")
    parser.add_argument(
        "--pairs", type=int, default=FITTED_ON, help="dev questions that a transfer delta is fitted on"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all studies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results that were kept; not run again")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object on stdout")
    options = parser.parse_args()
    output, everything = Output(options.json), []
    for shots in SHOTS if options.shots is None else (options.shots,):
        place = Place(shots, SEARCHES, options.out, options.n)
        kept = earlier(place, options.results)["oracles"].get(str(shots), {})
        for name in chosen_sets(options.sets):
            file = file_of(place, name)
            known = json.loads(file.read_text()) if file.exists() else kept.get(name, {})
            if (known.get("n"), known.get("transfer_fit", {}).get("pairs")) != (options.n, options.pairs):
                output.note(f"{name}, {shots} solved examples ...")
                known = measure(place, name, options.pairs)
                write_json(file, known)
            everything.append({"set": name, "shots": shots, **known})
            output.text(told(name, shots, known))
    output.data({"oracles": everything})


if __name__ == "__main__":
    main()
