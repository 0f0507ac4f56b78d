"""Count the experts that really ran, per sequence and layer, without a device sync per token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.report import Report, SequenceReport
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.taps import Call


def returned_rows(prompts: int, repeats: int, returned: int) -> list[int]:
    """For each returned sequence its row in the session, where each prompt has `repeats` rows."""
    copies = returned // prompts
    return [i // copies * repeats + i % copies for i in range(returned)]


class UsageMeter:
    """Counts from `start()` on: the model's own stream only, real tokens only."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._kept: list[Tensor] = []  # per layer [B], experts with a weight
        self._tokens: list[Tensor] = []  # per layer [B], routed tokens

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block only."""
        self.start()
        try:
            yield
        finally:
            if self._observe in self.session.observers:
                self.session.observers.remove(self._observe)

    def start(self) -> None:
        """Begin to count. Nothing is watched where no strategy can change the number of experts."""
        session = self.session
        self._kept = [torch.zeros(session.sequences, dtype=torch.int64) for _ in session.sites]
        self._tokens = [t.clone() for t in self._kept]
        if session.edits_selection:
            session.observers.append(self._observe)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this block are not counted: adaptations read tokens that were counted when decoded."""
        watching = self._observe in self.session.observers
        if watching:
            self.session.observers.remove(self._observe)
        try:
            yield
        finally:
            if watching:
                self.session.observers.append(self._observe)

    def _observe(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        own = rows.tokens // rows.streams
        batch = rows.batch // rows.streams
        valid = rows.valid[:batch].to(weights.device)  # [B, S]
        used = (weights[:own] != 0).sum(1).view(batch, -1) * valid  # [B, S]
        index = rows.sequence[:batch].to(weights.device)
        layer = site.index
        kept, tokens = self._kept[layer].to(weights.device), self._tokens[layer].to(weights.device)
        self._kept[layer] = kept.index_add(0, index, used.sum(1))
        self._tokens[layer] = tokens.index_add(0, index, valid.sum(1))

    def per_layer(self, sequence: int) -> list[float]:
        """Mean experts per token in each layer; the model's own `K` where nothing was counted."""
        means = []
        for site, kept, tokens in zip(self.session.sites, self._kept, self._tokens, strict=True):
            seen = int(tokens[sequence])
            means.append(int(kept[sequence]) / seen if seen else float(site.top_k))
        return means

    def report(self, prompt: Context, sequences: Tensor, rows: list[int], seconds: dict[str, float]) -> Report:
        """The report of a finished call. `sequences [R, T']` are the returned ids, `rows` theirs in the session."""
        session = self.session
        copies = sequences.shape[0] // prompt.ids.shape[0]
        inside = ~session.endings.outside(sequences[:, prompt.ids.shape[1] :])  # [R, T' - T]
        entries = []
        for i, row in enumerate(rows):
            per_layer = self.per_layer(row)
            facts = {run.strategy.name: run.report(row) for run in session.runs}
            if session.decoding is not None:
                facts[session.decoding.strategy.name] = session.decoding.report(row)
            entries.append(
                SequenceReport(
                    prompt_tokens=int(prompt.mask[i // copies].sum()),
                    new_tokens=int(inside[i].sum()),
                    strategies=facts,
                    experts_per_token=sum(per_layer) / len(per_layer),
                    experts_per_layer=per_layer,
                )
            )
        return Report(
            entries,
            [s.name for s in session.sites],
            [s.top_k for s in session.sites],
            {name: 1000 * value for name, value in seconds.items()},
        )
