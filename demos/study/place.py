"""Where does a study live, and what do its variants share: questions, tuned options, thresholds, masks?

A folder for each model: `out/study/FINGERPRINT/SHOTSshot/...`, so that what was found on one model never mixes with
another's. Everything that is made once is kept there and found again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from rich.console import Console

import ttrouting as ttr
from ttrouting.cli.calibrate import pocket_texts
from ttrouting.evaluation.adapted_lm import AdaptedLM
from ttrouting.evaluation.compare import compare
from ttrouting.evaluation.documents import Asking, build
from ttrouting.evaluation.files import prepare
from ttrouting.evaluation.progress import bars
from ttrouting.evaluation.question import Question, Variant, seed_everything, with_base
from ttrouting.evaluation.recipes import read_recipe, write_recipe
from ttrouting.evaluation.run import run
from ttrouting.evaluation.tasks import load_tasks
from ttrouting.evaluation.tuning import choose, freeze, trials
from ttrouting.pocket.measure import complete
from ttrouting.pocket.skills import SKILLS
from ttrouting.strategy import Strategy
from ttrouting.target import Target

OUT = Path("out/study")
BATCH = 64  # documents at a time: a model this small is twice as fast with 64 as with 16
ROWS = 128  # the same where each document is sampled
TRIALS = 20  # combinations of options that are tried at most
SEED = 0  # of solved examples and samples
DEMONSTRATIONS = 25  # questions that an expert mask is made from, as in its paper


@dataclass(frozen=True)
class Asked:
    """One question as the evaluation asks it.

    Attributes:
        prompt: what the model reads. answer: the right one. completion: the answer as it goes on from the prompt.
    """

    prompt: str
    answer: str

    @property
    def completion(self) -> str:
        return self.completed(self.answer)

    def completed(self, answer: str) -> str:
        """An answer as it goes on from this prompt, with the end of its line."""
        return f"{answer}\n" if self.prompt.endswith(" ") else f" {answer}\n"


@dataclass(frozen=True)
class Search:
    """Options of a strategy that are chosen on dev questions: values by option, and the sets that choose."""

    strategy: Strategy
    space: Mapping[str, Sequence[Any]]
    sets: tuple[str, ...]


@dataclass
class Place:
    """One number of solved examples on one model.

    Args:
        shots: solved examples before each question. out: where studies live.
        n, dev: test questions of a set; dev questions of a set that options are chosen on.
        console: where bars are drawn; None draws none.
    """

    shots: int
    searches: Mapping[str, Search]
    out: Path = OUT
    n: int = 500
    dev: int = 40
    console: Console | None = None
    _tasks: dict[tuple[str, str], Task] = field(default_factory=dict)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        torch.set_num_threads(1)  # a model this small gains nothing from more, and results do not depend on them
        return ttr.load_pocket()

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def fingerprint(self) -> str:
        """Of the model."""
        return Target(self.model, ttr.find_sites(self.model)).fingerprint

    @property
    def home(self) -> Path:
        """The folder of the model's study."""
        return self.out / self.fingerprint[:12]

    @property
    def folder(self) -> Path:
        """The folder of its part with so many solved examples."""
        return self.home / f"{self.shots}shot"

    # --- questions --------------------------------------------------------------------------------

    def task(self, name: str, split: str) -> Task:
        """A set as lm-eval's task."""
        if (name, split) not in self._tasks:
            seed_everything(SEED)
            asked = f"pocket_{name}"
            self._tasks[name, split] = load_tasks([asked], split=split, num_fewshot=self.shots, seed=SEED)[asked]
        return self._tasks[name, split]

    def questions(self, name: str, split: str, n: int) -> list[Asked]:
        """The first `n` questions of a set, with the prompts that the evaluation gives them."""
        documents = build(f"pocket_{name}", self.task(name, split), Asking(limit=n, seed=SEED))
        return [Asked(str(d.instances[0].args[0]), d.target) for d in documents]

    # --- runs -------------------------------------------------------------------------------------

    def evaluate(self, folder: Path, variants: Sequence[Variant], sets: Sequence[str], **asked: Any) -> Question:
        """Base and variants on some sets into a folder, as `ttrouting eval --resume` does; then `comparison.json`."""
        sampled = asked.get("samples", 1) > 1
        question = Question(
            tasks=tuple(f"pocket_{name}" for name in sets),
            num_fewshot=self.shots,
            batch_size=ROWS if sampled else BATCH,
            seed=SEED,
            variants=tuple(with_base(variants)),
            **asked,
        )
        prepare(folder, resume=True)
        lm = AdaptedLM(
            self.model,
            tokenizer=self.tokenizer,
            name="pocket",
            no_harm=question.no_harm,
            seed=SEED,
            batch_size=question.batch_size,
        )
        tasks = {f"pocket_{name}": self.task(name, question.split) for name in sets}
        try:
            with bars(self.console) as told:
                run(question, lm, tasks, folder, told=told)
        finally:
            lm.close()
        compare(folder)
        return question

    # --- what is made once ------------------------------------------------------------------------

    def chosen(self, name: str) -> Strategy:
        """A strategy with the options that were best on dev, searched when it is first asked for."""
        return self.recipe(name).strategies[0]

    def recipe(self, name: str) -> Any:
        """The same as a recipe, as `ttrouting tune` freezes it."""
        search, file = self.searches[name], self.folder / "recipes" / f"{name}.json"
        if not file.exists():
            folder = self.folder / "tuning" / name
            found = trials(search.strategy, search.space, TRIALS, SEED)
            question = self.evaluate(folder, found, search.sets, split="dev", limit=self.dev)
            best = choose(folder, question, compare(folder))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_recipe(file, freeze(name, folder, question, best, self.fingerprint))
        recipe = read_recipe(file)
        recipe.check(self.fingerprint, True)
        return recipe

    def saved(self, name: str, make: Callable[[], Strategy]) -> Strategy:
        """A strategy from its file, made if there is none."""
        folder = self.folder / "made" / name
        if not folder.exists():
            ttr.save(folder, make())
        (found,) = ttr.load(folder)
        return found

    def calibrated(self, rule: str, share: float) -> Strategy:
        """Dynamic-k by a rule, with the threshold that keeps this share of experts on reference questions.

        Well under three quarters, which are wanted: no-harm gives the prompts that lose by it all their experts back.
        `k_min` is 1 under every rule: the floor of 2 that the entropy rule has elsewhere is all that this model has.
        """
        top_k = sum(site.top_k for site in ttr.find_sites(self.model)) / len(ttr.find_sites(self.model))

        def make() -> Strategy:
            return ttr.calibrate(self.model, self.tokenizer, pocket_texts(), share * top_k, rule, k_min=1)

        return self.saved(f"dynamic_k_{rule}", make)

    def mask(self, name: str, keep: float = 0.5) -> Strategy:
        """An expert mask of a set, from dev questions and the model's own answers to them."""

        def make() -> Strategy:
            prompts = [q.prompt for q in self.questions(name, "dev", DEMONSTRATIONS)]
            answers = complete(self.model, self.tokenizer, prompts)
            texts = [p + a.partition("\n")[0] + "\n" for p, a in zip(prompts, answers, strict=True)]
            return ttr.ExpertMask.from_demonstrations(self.model, self.tokenizer, texts, keep)

        return self.saved(f"expert_mask_{name}", make)


def set_names(trained: bool) -> tuple[str, ...]:
    """Sets by whether skill and dialect stood together in the model's training text, as `reverse_letters`."""
    return tuple(
        f"{skill}_{dialect}"
        for skill in SKILLS
        for dialect in ("digits", "letters")
        if (dialect in SKILLS[skill].trained_dialects) == trained
    )
