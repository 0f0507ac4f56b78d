"""How does a call come to be written down: which selection did each token of each sequence meet?

Legend: `B` forward rows, `S` tokens a row, `N = B * S`, `T` tokens of a sequence, `L` layers, `K` columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttrouting.errors import CoverageError
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.spans import token_starts
from ttrouting.taps import Call
from ttrouting.trace import NO_EXPERT, RoutingTrace


class _Part(NamedTuple):
    """What one layer did in one forward: `ids [N, K]`, `weights [N, K]`, `entropy [N]`."""

    rows: Rows
    ids: Tensor
    weights: Tensor
    entropy: Tensor


class TraceRecorder:
    """Watches a session's forwards from now on. Of a token that is read again the last routing stays."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._parts: list[list[_Part]] = [[] for _ in session.sites]
        # a list that grows would be compiled anew for every token
        session.observers.append(torch.compiler.disable(self._observe))

    def _observe(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        own = rows.tokens // rows.streams  # further streams are those of a decoding strategy
        with torch.no_grad():
            pi = call.probabilities()[:own]  # [N, E]
            ran = (weights[:own] != 0) & (ids[:own] < site.num_experts)  # [N, K]
            part = _Part(
                rows,
                torch.where(ran, ids[:own], NO_EXPERT),
                torch.where(ran, weights[:own], 0).float(),
                torch.special.entr(pi).sum(1),
            )
        self._parts[site.index].append(part)

    def traces(self, ids: Tensor, mask: Tensor, sequences: Tensor, rows: list[int]) -> list[RoutingTrace]:
        """The traces of a call that has ended, one for each of the `R` sequences that it returned.

        Args:
            ids, mask: `[B, T]`, the prompts. sequences: `[R, T']`, prompts and what was generated.
            rows: of the returned sequences in the session.

        Raises:
            CoverageError: a token was not seen by a layer.
        """
        copies, found = len(rows) // ids.shape[0], []
        for i, row in enumerate(rows):
            prompt = ids[i // copies][mask[i // copies]].tolist()
            found.append(self._trace(row, [*prompt, *sequences[i, ids.shape[1] :].tolist()], len(prompt)))
        return found

    def _trace(self, row: int, ids: list[int], prompt_tokens: int) -> RoutingTrace:
        """The trace of one row of the session; of its tokens `ids` those at the end were not read."""
        session, tokenizer = self.session, self.session.plan.target.tokenizer
        # forwards are the same for all layers
        forwards = {id(part.rows): part.rows for parts in self._parts for part in parts}
        places = {number: _places(rows, row) for number, rows in forwards.items()}
        layers = [_gather(parts, places) for parts in self._parts]
        for site, (*_, seen) in zip(session.sites, layers, strict=True):
            if not bool(seen.all()):
                raise CoverageError(
                    f"{site.name} was seen on {int(seen.sum())} of {len(seen)} tokens, so there is no trace of "
                    "this call. A fused or hub kernel may bypass the router: load with use_kernels=False."
                )
        widest = max(ids.shape[1] for ids, *_ in layers)
        length = len(layers[0][0])
        ids = ids[:length]
        return RoutingTrace(
            torch.stack([_pad(found, widest, NO_EXPERT) for found, *_ in layers], 1).to(torch.int16),
            torch.stack([_pad(weights, widest, 0) for _, weights, *_ in layers], 1).to(torch.float32),
            torch.stack([entropy for *_, entropy, _ in layers], 1).to(torch.float32),
            _pieces(ids, tokenizer),
            tuple(site.name for site in session.sites),
            max(site.num_experts for site in session.sites),
            min(prompt_tokens, length),
            session.plan.target.fingerprint,
        )


def _gather(parts: list[_Part], places: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, one sequence: `ids [T, K]`, `weights [T, K]`, `entropy [T]`, and which tokens were seen `[T]`."""
    length = 1 + max((int(position.max()) for position, _ in places.values() if len(position)), default=-1)
    widest = max((part.ids.shape[1] for part in parts), default=0)
    ids = torch.full((length, widest), NO_EXPERT, dtype=torch.int64)
    weights, entropy = torch.zeros(length, widest).double(), torch.zeros(length).double()
    seen = torch.zeros(length, dtype=torch.bool)
    for part in parts:
        position, token = places[id(part.rows)]
        there = token.to(part.ids.device)
        ids[position] = _pad(part.ids[there].cpu(), widest, NO_EXPERT)
        weights[position] = _pad(part.weights[there].double().cpu(), widest, 0)
        entropy[position] = part.entropy[there].double().cpu()
        seen[position] = True
    return ids, weights, entropy, seen


def _places(rows: Rows, row: int) -> tuple[Tensor, Tensor]:
    """Positions inside the sequence, and where in the forward its tokens are, both `[T']`."""
    batch = rows.batch // rows.streams
    mine = rows.valid[:batch] & (rows.sequence[:batch] == row)[:, None]  # [B, S]
    return rows.position[:batch][mine].cpu(), mine.flatten().nonzero().flatten().cpu()


def _pad(columns: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]), value=value)


def _pieces(ids: list[int], tokenizer: Any) -> tuple[str, ...]:
    """The text of each token."""
    if tokenizer is None:
        return tuple(str(i) for i in ids)
    text, starts = token_starts(ids, tokenizer)
    return tuple(text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)], strict=True))
