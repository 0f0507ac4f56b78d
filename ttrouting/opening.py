"""A text as adaptations read it: once with all layers, then again under other edits, with as little as those need.

Legend: `B` sequences, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.objective import log_probabilities, losses_of
from ttrouting.session import Session
from ttrouting.tail import Tail


class Opening:
    """A text before decoding goes on from it.

    Where `generate` can go on from a cache (`session.hands_over`), all tokens but the last are read into it: there
    is no second prefill. The losses of a text need no more, as its last token predicts what is not there yet.
    """

    def __init__(self, session: Session, context: Context, tail: Tail, decoding: bool = False) -> None:
        """`tail`: the layers that the edits to come may touch. `decoding`: it goes on from all but the last token."""
        self._session, self._context, self._tail, self._decoding = session, context, tail, decoding
        self._cached = session.hands_over or decoding
        self._text = context.head() if self._cached else context
        self._before: list[Any] = list(session.cache.layers) if decoding else []

    @torch.no_grad()
    def begin(self) -> tuple[Tensor, Tensor]:
        """Read everything. `[B, T]` losses and `[B, V]` log-probabilities of the next token, as `token_losses`.

        While decoding, its layers below the tail have done so.
        """
        if self._decoding:
            return self._read(self._tail, nullcontext(), fill=False)
        return self._read(None, self._tail.capture())

    def losses(self) -> Tensor:
        """`[B, T]` under the edits of the moment, differentiable; only the tail is run."""
        hidden, head = self._session.read_body(self._text, self._tail)
        return losses_of(self._session, self._context, hidden, head)

    @torch.no_grad()
    def end(self, fill: bool = True) -> tuple[Tensor, Tensor]:
        """As `begin`, by the tail; what it changes in the cache is changed there, unless `fill` is off."""
        return self._read(self._tail, nullcontext(), fill)

    def undo(self) -> None:
        """Nothing was learned: `generate` reads the prompt itself, to the bits of the base model.

        While decoding, the cache is again as it was.
        """
        if self._decoding:
            self._session.cache.layers[:] = self._before
        elif self._cached:
            self._session.cache = None

    @torch.no_grad()
    def next_token(self) -> Tensor:
        """`[B, V]` log-probabilities of the next token, where edits touch no token but the last."""
        session, context = self._session, self._context
        if self._cached:
            return log_probabilities(session.peek(context), context)
        hidden, head = session.read_body(context, self._tail)
        return log_probabilities(head(hidden[:, -1:])[:, 0], context)

    def _read(
        self, replay: Tail | None, capture: AbstractContextManager[None], fill: bool = True
    ) -> tuple[Tensor, Tensor]:
        session, context = self._session, self._context
        with capture:
            hidden, head = session.read_body(self._text, replay, fill=fill and self._cached)
        losses = losses_of(session, context, hidden, head)
        if self._cached:
            return losses, log_probabilities(session.peek(context), context)
        return losses, log_probabilities(head(hidden[:, -1:])[:, 0], context)
