"""Evaluate from Python: base and two variants on the same documents, compared in pairs, with their cost.

    python demos/evaluate.py                       # needs pip install "ttrouting[eval]"
    python demos/evaluate.py --n 200 --out runs/reverse

The same as `ttrouting eval --tasks pocket_reverse_letters --adapt task_delta --adapt dynamic_k --limit 40`. Every
finished document is on disk at once; `ttrouting report FOLDER` draws what is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ttrouting as ttr
from ttrouting.evaluation.adapted_lm import AdaptedLM
from ttrouting.evaluation.compare import compare
from ttrouting.evaluation.files import prepare
from ttrouting.evaluation.question import Question, Variant, with_base
from ttrouting.evaluation.report.markdown import table
from ttrouting.evaluation.run import run
from ttrouting.evaluation.tasks import load_tasks

TASK = "pocket_reverse_letters"  # any task of lm-eval works as well
VARIANTS = [
    Variant("task_delta", (ttr.TaskDelta(),)),
    Variant("task_delta, fewer experts", (ttr.TaskDelta(), ttr.DynamicK(p=0.5))),
]


def evaluate(out: Path, n: int) -> dict[str, Any]:
    """What `comparison.json` says about `n` documents; journals and results go into the folder `out`."""
    model, tokenizer = ttr.load_pocket()
    question = Question((TASK,), split="test", limit=n, num_fewshot=0, variants=tuple(with_base(VARIANTS)))
    prepare(out, resume=False)
    lm = AdaptedLM(model, tokenizer=tokenizer, name="pocket", batch_size=question.batch_size)
    run(question, lm, load_tasks([TASK], num_fewshot=0), out)
    return compare(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40, help="documents")
    parser.add_argument("--out", type=Path, help="folder to keep; a temporary one without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(options.out or Path(folder), options.n)
    print(table(found))
    print(*found["summary"].values(), sep="\n")


if __name__ == "__main__":
    main()
