"""C3PO: "Critical-Layer, Core-Expert, Collaborative Pathway Optimization", arXiv 2504.07964.

    python -m demos.papers.c3po                       # needs pip install "ttrouting[eval,embed]"
    python -m demos.papers.c3po --tiny

Model: OLMoE, `allenai/OLMoE-1B-7B-0125-Instruct` in fp16, as in the released code. The paper's DeepSeekMoE (66.4 ->
74.4 with ngd) comes with code of its own, which is not run here.
Task: ARC-Challenge, one of the six sets that the published averages are over; the letter of the highest likelihood.
Prompt: the instruction of the released code. How it writes question and options is not known here: one option a line,
then "Answer:".
References: 3,000 train questions each of OpenBookQA and SciQ; those count that the model answers correctly. They are
embedded by all-MiniLM-L6-v2 as in the released code (the paper: NV-Embed-V2).
Options: `C3PO.preset("paper")`, three neighbours, ten steps, the last 5 of 16 layers, 20 of 64 experts.
Published: averages over six sets, base beside each surrogate.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from demos.papers.reproduce import Paper, Place
from ttrouting import refsets
from ttrouting.evaluation.tasks.sets import SETS
from ttrouting.evaluation.tasks.sourced import SourcedTask
from ttrouting.strategies.c3po import C3PO
from ttrouting.strategy import Strategy

OLMOE, LETTERS, EACH = "allenai/OLMoE-1B-7B-0125-Instruct", "ABCD", 3000
BOOK, SCIQ = "allenai/openbookqa", "allenai/sciq"
ORDER = (
    "Answer with only a single letter (A, B, C, or D) representing the correct option. "
    "Do not explain your reasoning. Just output the letter of the answer. "
)
TASK = {
    "task": "arc_challenge",
    "dataset_path": "allenai/ai2_arc",
    "dataset_name": "ARC-Challenge",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": ORDER
    + "{{question}}\n{% for text in choices.text %}{{'ABCDE'[loop.index0]}}. {{text}}\n{% endfor %}Answer:",
    "doc_to_choice": "{{['A', 'B', 'C', 'D', 'E'][:choices.text|length]}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def load(names: Any, *, data_dir: Path | None, unsafe_code: bool) -> dict[str, Any]:
    """The task above; no task of lm-eval asks for a letter in these words."""
    metadata = {} if data_dir is None else {"data_dir": str(data_dir)}
    return {TASK["task"]: SourcedTask({**TASK, "metadata": metadata})}


def references(data_dir: Path | None, n: int = EACH) -> Iterator[dict[str, str]]:
    """Questions with their options and the right letter. In a local folder SciQ is `sciq/train.jsonl`."""
    if data_dir is None:
        book, sciq = (datasets.load_dataset(name, split=f"train[:{n}]") for name in (BOOK, SCIQ))
    else:
        book = SETS[BOOK].read(data_dir, "main")["train"][:n]
        sciq = list(map(json.loads, (data_dir / "sciq" / "train.jsonl").read_text().splitlines()[:n]))
    for row in book:
        yield _record(row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
    for row in sciq:
        options = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
        random.Random(row["question"]).shuffle(options)
        yield _record(row["question"], options, options.index(row["correct_answer"]))


def _record(question: str, options: list[str], right: int) -> dict[str, Any]:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, options, strict=True))
    return {"prompt": f"{ORDER}{question}\n{lines}Answer:", "letters": list(LETTERS), "answer": LETTERS[right]}


def variants(place: Place) -> dict[str, list[Strategy]]:
    """What is compared with base. The reference set is made once, in the folder of the results."""
    refset = refsets.build(
        place.model,
        place.tokenizer,
        list(references(place.data_dir)),
        place.out / "references",
        embedder="model" if place.tiny else "sentence-transformers/all-MiniLM-L6-v2",
        prompt="{prompt}",
        answer=" {answer}",
        judge="choice",
        choices="letters",
        choice_score="sum",
        name=place.name,
    )
    embedder = None if place.tiny else "sentence-transformers/all-MiniLM-L6-v2"
    surrogates = ("mode_finding", "kernel_regression", "ngd")
    return {name: [C3PO.preset("paper", refset=refset, surrogate=name, embedder=embedder)] for name in surrogates}


AVERAGES = {"mode_finding": "69.9 -> 72.4", "kernel_regression": "69.9 -> 76.9", "ngd": "69.9 -> 79.2"}
PAPER = Paper(
    title="C3PO, arXiv 2504.07964",
    models={OLMOE: {"model_type": "olmoe", "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8}},
    tasks=("arc_challenge",),
    variants=variants,
    published={
        (OLMOE, "arc_challenge", name): f"{said}, average over six sets (with the answers known: 85.2)"
        for name, said in AVERAGES.items()
    },
    cost="6 to 7x the FLOPs",
    dtype="float16",
    load=load,
)

if __name__ == "__main__":
    PAPER.main(__doc__)
