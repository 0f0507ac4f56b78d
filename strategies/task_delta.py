"""Task deltas: what labelled references of a task taught once is added to router logits of prompts like them.

C3PO's neighbourhood gradient descent learns from a question's neighbours anew for every question. Here `ttrouting
refset fit` fitted one delta for each task of a reference set beforehand, and a classifier that tells the tasks apart.
What happens during a call is in `_task_delta_run.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ttrouting.errors import ConfigError, UnsupportedModelError
from ttrouting.head import check_head
from ttrouting.refsets import ReferenceSet
from ttrouting.refsets.task_deltas import TaskDeltas
from ttrouting.session import Session
from ttrouting.strategies._asking import AsksReferences
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range, one_of
from ttrouting.target import Target


@dataclass(frozen=True)
class TaskDelta(AsksReferences, RoutingStrategy):
    """Add `sum_g p_g delta_g` to the router logits of every token of prompt and answer.

    `p_g` is the probability of task g by multinomial logistic regression on the prompt's mean-pooled hidden state;
    `delta_g [L, E]` was fitted to the answers of the task's references, and is 0 where held-out references did not
    confirm it.

    A prompt that is unlike every reference, or whose task is not certain, keeps its base routing. With `no_harm` so
    does one whose task has no confirmed delta, and one whose next-token distribution would move too far.

    Args:
        refset: a reference set, its folder, or `pocket` for the one shipped for the pocket model.
        deltas: folder that `ttrouting refset fit` wrote into; None: the set's own.
        min_probability: that the most probable task needs; high, as a task that looks like it may need no delta.
        min_similarity: cosine to the nearest reference that a prompt needs; None: three quarters of the
            least that the set's own questions were measured to have when the deltas were fitted.
        embed_on: what of a prompt is compared with references, which are single questions: `question`, from where the
            beginning that all references share stands last; `all`; or a regular expression, from its last match on.
            A prompt without a match is compared as a whole.
        kl_limit: largest KL(adapted || base) of the next token, in nats, that `no_harm` accepts. Much higher than
            elsewhere: a delta that was confirmed moves most where the model is sure of a wrong answer.
        index: `auto`, `flat`, `hnsw` or `ivfpq`.
        embedder: as in C3PO, for sets made with another embedder than the model itself.
    """

    name: ClassVar[str] = "task_delta"
    summary: ClassVar[str] = "deltas fitted once for each task, which is recognised; one more prefill, decode free"
    order: ClassVar[int] = 15
    unique: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"min_probability": (0.5, 0.8, 0.95)}

    refset: str | ReferenceSet = "pocket"
    deltas: str | None = None
    min_probability: float = 0.8
    min_similarity: float | None = None
    embed_on: str = "question"
    kl_limit: float = 20.0
    index: str = "auto"
    embedder: Any = None

    def __post_init__(self) -> None:
        self.check_refset()
        if self.deltas is not None and not isinstance(self.deltas, (str, os.PathLike)):
            raise ConfigError(f"task_delta.deltas must be the folder of fitted deltas, got {self.deltas!r}.")
        in_range(self.name, "min_probability", self.min_probability, 0, 1)
        if self.min_similarity is not None:
            in_range(self.name, "min_similarity", self.min_similarity, -1, 1)
        in_range(self.name, "kl_limit", self.kl_limit, 0, open_low=True)
        one_of(self.name, "index", self.index, ("auto", "flat", "hnsw", "ivfpq"))
        if not isinstance(self.embed_on, str) or not self.embed_on:
            raise ConfigError(
                f"task_delta.embed_on must be 'question', 'all' or a regular expression, got {self.embed_on!r}."
            )
        if self.embed_on not in ("question", "all"):
            try:
                re.compile(self.embed_on)
            except re.error as error:
                raise ConfigError(
                    f"task_delta.embed_on={self.embed_on!r} is no regular expression: {error}."
                ) from None

    @property
    def identity(self) -> bool:
        """No task of the set has a delta."""
        return not self.bank.accepted

    @cached_property
    def bank(self) -> TaskDeltas:
        """The deltas, read when they are first asked for."""
        return TaskDeltas.open(self.references.path if self.deltas is None else self.deltas, self.references)

    @cached_property
    def question(self) -> re.Pattern[str] | None:
        """Where the part of a prompt begins that is compared; None: everything is."""
        if self.embed_on == "question":
            return re.compile(re.escape(self.bank.head)) if self.bank.head else None
        return None if self.embed_on == "all" else re.compile(self.embed_on)

    def to_dict(self) -> dict[str, Any]:
        """As every strategy's, with set and embedder by their names."""
        deltas = None if self.deltas is None else str(self.deltas)
        return {**super().to_dict(), **self.named(), "deltas": deltas}

    def check(self, target: Target) -> None:
        """Set and deltas must be the model's own; texts need a tokenizer."""
        if not getattr(target.model, "can_generate", lambda: False)():
            raise UnsupportedModelError(
                f"task_delta needs next-token logits, and {type(target.model).__name__} has no causal language-model "
                "head. Load the ...ForCausalLM class."
            )
        self.check_references(target)
        if self.identity:
            return
        if target.tokenizer is None and (self.question is not None or self.embedder is not None):
            raise ConfigError(
                "task_delta looks for the question in the prompt's text and needs the tokenizer: ttr.adapt(model, "
                "..., tokenizer=tokenizer). Or compare whole prompts: embed_on='all'."
            )
        check_head(target)

    def start(self, session: Session) -> RoutingRun:
        """Nothing is added before the task is recognised."""
        from ttrouting.strategies._task_delta_run import TaskDeltaRun

        return TaskDeltaRun(self, session)
