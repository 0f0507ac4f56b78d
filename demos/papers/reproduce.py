"""What the papers share: load a model or a tiny one like it, ask base and variants in pairs, print both numbers.

A paper's method is run as it was published: without the no-harm rule, unless `--no-harm` asks for it. A module of a
paper says which numbers it knows, as text; where a paper says nothing, nothing stands there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demos.papers.tiny import tiny_model, write_sets
from ttrouting.cli.models import load_model
from ttrouting.errors import TTRoutingError
from ttrouting.evaluation.adapted_lm import AdaptedLM
from ttrouting.evaluation.compare import compare
from ttrouting.evaluation.documents import Asking, Document, build
from ttrouting.evaluation.files import prepare
from ttrouting.evaluation.question import Question, Variant, with_base
from ttrouting.evaluation.run import run
from ttrouting.evaluation.tasks import load_tasks
from ttrouting.strategy import Strategy

TINY_TOKENS = 8  # of an answer


@dataclass(frozen=True)
class Place:
    """Where variants are made: the model, its id, the folder of the sets (None: the hub), a folder to write in."""

    model: Any
    tokenizer: Any
    name: str
    data_dir: Path | None
    out: Path
    tiny: bool

    def unscored(self, task: str, n: int) -> list[Document]:
        """The first documents of a task's dev split, which shares none with what is scored."""
        found = load_tasks([task], data_dir=self.data_dir, split="dev")[task]
        return build(task, found, Asking(limit=n))


@dataclass(frozen=True)
class Paper:
    """A published setting.

    Attributes:
        title: of the method, with its arXiv number. models: by id on the hub, the architecture of a tiny one; the
            first is the default. tasks: names, the first is the default. variants: by name, what is compared with
            base. published: what the paper says, by model, task and variant. cost: the same of cost.
        max_new_tokens: of an answer, None for the task's own. dtype: of the weights. load: of tasks.
    """

    title: str
    models: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    variants: Callable[[Place], Mapping[str, Sequence[Strategy]]]
    published: Mapping[tuple[str, str, str], str]
    cost: str
    max_new_tokens: int | None = None
    dtype: str = "bfloat16"
    load: Callable[..., dict[str, Any]] = load_tasks

    def main(self, about: str | None, arguments: Sequence[str] | None = None) -> None:
        """The command: `about` is the docstring of the paper's module."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up records, offline")
        parser.add_argument("--model", choices=list(self.models), default=next(iter(self.models)))
        parser.add_argument("--tasks", nargs="+", choices=self.tasks, default=list(self.tasks[:1]))
        parser.add_argument("--data-dir", type=Path, help="folder of the sets; without it they come from the hub")
        parser.add_argument("--limit", type=int, help="documents of each task; without it, all")
        parser.add_argument("--batch-size", type=int, default=1)
        parser.add_argument("--no-harm", action="store_true", help="with our rule, which no paper has")
        parser.add_argument("--out", type=Path, help="folder of the results, to keep and to go on from")
        parser.add_argument("--confirm-run-unsafe-code", action="store_true", help="HumanEval and MBPP run code")
        options = parser.parse_args(arguments)
        try:
            print(self.told(options, self.measure(options)))
        except TTRoutingError as error:
            parser.exit(1, f"{error}\n")

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """Base and every variant on the same documents, as `comparison.json` has it."""
        with ExitStack() as held:
            temporary = Path(held.enter_context(tempfile.TemporaryDirectory()))
            data_dir, out = options.data_dir, options.out or temporary / "out"
            if options.tiny:
                data_dir = temporary / "sets"
                write_sets(data_dir)
                model, tokenizer = tiny_model(self.models[options.model])
            else:
                model, tokenizer = load_model(options.model, self.dtype, "map")
            tasks = self.load(options.tasks, data_dir=data_dir, unsafe_code=options.confirm_run_unsafe_code)
            longest = TINY_TOKENS if options.tiny else self.max_new_tokens
            for task in tasks.values():
                if task.OUTPUT_TYPE == "generate_until" and longest is not None:
                    task.set_config("generation_kwargs", {"max_gen_toks": longest}, update=True)
            prepare(out, resume=True)
            place = Place(model, tokenizer, options.model, data_dir, out, options.tiny)
            variants = [Variant(name, tuple(strategies)) for name, strategies in self.variants(place).items()]
            question = Question(
                tuple(tasks),
                split="test",
                limit=options.limit,
                batch_size=options.batch_size,
                no_harm=options.no_harm,
                variants=tuple(with_base(variants)),
            )
            lm = AdaptedLM(
                model,
                tokenizer=tokenizer,
                name=options.model,
                batch_size=options.batch_size,
                no_harm=options.no_harm,
            )
            run(question, lm, tasks, out)
            return compare(out)

    def told(self, options: argparse.Namespace, found: Mapping[str, Any]) -> str:
        """Published beside measured."""
        random = " (its architecture, tiny, with random weights)" if options.tiny else ""
        lines = [f"{self.title}\nmodel {options.model}{random}"]
        for task, one in found["tasks"].items():
            for name, cell in one["variants"].items():
                said = self.published.get((options.model, task, name), "no number is known here")
                low, high = (100 * end for end in cell["difference_interval"])
                experts = cell["cost"]["experts_per_token"]
                lines += [
                    f"{task}, {name}",
                    f"    published  {said}",
                    f"    measured   {100 * cell['base']:.2f} -> {100 * cell['mean']:.2f}, difference "
                    f"{100 * cell['difference']:+.1f} [{low:+.1f}, {high:+.1f}], n {cell['n']}: {cell['verdict']}",
                    f"    cost       {_times(cell['ratios'])}, {experts:.2f} experts a token",
                ]
        return "\n".join([*lines, f"published cost: {self.cost}"])


def _times(ratios: Mapping[str, float | None]) -> str:
    """Of time and FLOPs, to base."""
    known = {"time": ratios["seconds"], "FLOPs": ratios["flops"]}
    return ", ".join(f"{value:.2f}x the {name}" for name, value in known.items() if value is not None)
