"""How does a file of records become a reference set? In batches, each kept as soon as it is done.

    refset = build(model, tokenizer, "train.jsonl", "sets/train", prompt="Q: {question}\\nA:", answer=" {answer}\\n")

A build that was stopped, at whatever moment, goes on where it was when the same build is asked for again.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.generation import check_model_call
from ttrouting.refsets.draft import Draft, check_plan, open_draft
from ttrouting.refsets.embedders import Embedder, EmbedFunction, as_embedder
from ttrouting.refsets.judging import Asked, Judge
from ttrouting.refsets.manifest import DRAFT, KIND, MANIFEST, SCHEMA, read_manifest
from ttrouting.refsets.recipe import Counts, Question, Questions, Recipe
from ttrouting.refsets.records import Record
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.refsets.sources import Source, open_source
from ttrouting.refsets.vectors import unit
from ttrouting.sites import find_sites, text_config
from ttrouting.target import Target

MODEL = "model"  # the embedder that is the model itself


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        read, of: records of the source. records: kept so far. before: read by earlier runs of the same build.
    """

    read: int
    of: int
    records: int
    before: int


def build(
    model: Any,
    tokenizer: Any,
    data: Any,
    out: str | Path,
    *,
    embedder: str | EmbedFunction | Embedder = MODEL,
    batch_size: int = 16,
    name: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> ReferenceSet:
    """Ask a model the records of a source, and keep those that it answers correctly as a reference set.

    Asked for again it goes on where it was, and returns a finished set as it is. Another batch size may be used to go
    on; everything else that decides what is in the set must be the same.

    Args:
        model, tokenizer: a supported model in eval mode. data: as in `ttrouting.refsets.sources.open_source`.
        out: folder of the set, new or begun. embedder: "model" (its mean-pooled hidden state), the name or folder of
            a sentence-transformers model, a function or an `Embedder`; it gets the prompts.
        batch_size: texts in one forward. name: of the model, for people. subset, split: of a set on the hub.
        restart: drop a build that was begun here under other options. progress: called after every batch.
        options: those of `ttrouting.refsets.recipe.Recipe`: prompt, answer, judge, keep, limit, shard ...

    Raises:
        ConfigError: an option, a template or the data is wrong, or differs from those of the build that was begun.
        ArtefactError: the folder cannot be written or holds other things; no record was kept.
        NotMoEError, UnsupportedModelError, UnsupportedCallError: as in `ttr.adapt`.
    """
    recipe, folder = Recipe(**options), Path(out).expanduser()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"build needs a loaded model that is not adapted, got {model!r}.")
    check_model_call(model)
    source = data if isinstance(data, Source) else open_source(data, subset=subset, split=split, limit=recipe.limit)
    target = Target(model, find_sites(model), tokenizer)
    tool = None if isinstance(embedder, str) and embedder == MODEL else as_embedder(embedder)
    plan = {
        "fingerprint": target.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "embedder": MODEL if tool is None else tool.name,
        "data": source.sha256,
        **recipe.to_dict(),
    }
    if (folder / MANIFEST).exists():
        done = read_manifest(folder)["provenance"].get("plan", {})
        check_plan(done, plan, f"{folder} holds a finished set", "delete it")
        shutil.rmtree(folder / DRAFT, ignore_errors=True)  # a kill may have come before this
        return ReferenceSet.open(folder)
    with open_draft(folder, plan, restart) as draft:
        counts = _Build(target, tokenizer, source, recipe, tool, batch_size).run(draft, progress)
        if counts.records == 0:
            draft.drop()
            raise ArtefactError(
                f"No record was kept: of {counts.read} records of {source.name}, {counts.bad} could not be used"
                f"{f' ({counts.first_bad})' if counts.first_bad else ''}, {counts.too_long} were too long and "
                f"{counts.correct} were answered correctly. Check the templates and the judge; keep='all' keeps "
                "wrong answers too."
            )
        draft.finish(_manifest(target, source, plan, counts, name or type(model).__name__), tool is None)
    return ReferenceSet.open(folder)


class _Build:
    """One run of a build."""

    def __init__(
        self, target: Target, tokenizer: Any, source: Source, recipe: Recipe, tool: Embedder | None, batch_size: int
    ) -> None:
        self.questions = Questions(source, recipe)
        self.judge = Judge(target, tokenizer, recipe, batch_size)
        self.keep_all = recipe.keep == "all"
        self.total = recipe.size(source)
        self.tool = tool
        self.batch_size = batch_size

    def run(self, draft: Draft, progress: Callable[[Progress], None] | None) -> Counts:
        """Read what is not read yet; the counts of everything."""
        stream = iter(self.questions)
        before = self._skip(stream, draft.counts)
        if progress:
            progress(Progress(before, self.total, self.questions.counts.records, before))
        number = 0
        while batch := list(itertools.islice(stream, self.batch_size)):
            number += 1
            self._commit(batch, draft)
            counts = self.questions.counts
            if number & (number - 1) == 0 and counts.read >= min(64, self.total):  # now and then, and soon
                draft.check_space(self.total)
            if progress:
                progress(Progress(counts.read, self.total, counts.records, before))
        return self.questions.counts

    def _skip(self, stream: Iterator[Question], done: Counts) -> int:
        """Read again up to where an earlier run was: repeated questions are known by having been seen."""
        if done.read:
            for _ in stream:
                if self.questions.counts.read >= done.read:
                    break
            self.questions.counts = done
        return done.read

    def _commit(self, batch: list[Question], draft: Draft) -> None:
        counts = self.questions.counts
        asked = []
        for question in self.judge.encode(batch):
            if not question.prompt or not all(question.answers):
                self.questions.count_bad(question.question.where, "its prompt or an answer has no token")
            elif not self.judge.fits(question):
                counts.too_long += 1
            else:
                asked.append(question)
        if not asked:
            return  # what was skipped is counted with the next batch, or skipped again
        judged = self.judge(asked)
        with np.errstate(over="ignore"):  # to infinity, which is refused
            omega = judged.omega.astype(np.float16)
        refuse_unusable(omega, asked, "pathway")
        kept = np.flatnonzero(judged.correct | self.keep_all)
        records = [asked[i].question for i in kept]
        if self.tool is None:
            raw = judged.pooled
            refuse_unusable(raw, asked, "embedding")
            raw = raw[kept]
        else:
            raw = self.tool.embed([q.prompt for q in records])
            refuse_unusable(raw, [asked[i] for i in kept], "embedding")
        correct = judged.correct[kept]
        counts.correct += int(judged.correct.sum())
        counts.records += len(kept)
        lines = [
            Record(q.prompt, q.answer, q.source, q.task, bool(right)).line()
            for q, right in zip(records, correct, strict=True)
        ]
        draft.commit(lines, correct, unit(raw).astype(np.float16), omega[kept], counts)


def refuse_unusable(values: NDArray[np.floating[Any]], asked: list[Asked], what: str) -> None:
    """Refuse rows `[n, ...]` that are zero or not finite.

    Raises:
        ArtefactError: with their number and the first record.
    """
    flat = values.reshape(len(asked), -1)
    bad = np.flatnonzero(~np.isfinite(flat).all(1) | ~flat.any(1))
    if len(bad):
        raise ArtefactError(
            f"{len(bad)} of {len(values)} {what}s in a batch are zero or not finite, the first at "
            f"{asked[bad[0]].question.where}. Load the model in another dtype (--dtype float32), or check the "
            "embedder."
        )


def _manifest(target: Target, source: Source, plan: dict[str, Any], counts: Counts, name: str) -> dict[str, Any]:
    """All of a manifest but its files and sizes."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "fingerprint": target.fingerprint,
        "model": name,
        "sites": {
            "hidden": text_config(target.model.config).hidden_size,
            "names": [site.name for site in target.sites],
        },
        "embedder": {"name": plan["embedder"]},
        "counts": asdict(counts),
        "provenance": {"plan": plan, "data": source.name, **made()},
    }


def made() -> dict[str, Any]:
    """When and with what a set is made."""
    from ttrouting import __version__

    versions = {"ttrouting": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"created": datetime.now(UTC).date().isoformat(), "versions": versions}
