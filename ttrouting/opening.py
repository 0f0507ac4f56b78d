"""A text as adaptations read it: once with all layers, then again under other edits, with as little as those need.

Legend: `B` sequences, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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

    def __init__(self, session: Session, context: Context, tail: Tail) -> None:
        """`tail`: the layers that the edits to come may touch."""
        self._session, self._context, self._tail = session, context, tail
        self._text = context.head() if session.hands_over else context

    @torch.no_grad()
    def begin(self) -> tuple[Tensor, Tensor]:
        """Read everything. `[B, T]` losses and `[B, V]` log-probabilities of the next token, as `token_losses`."""
        return self._read(None, self._tail.capture())

    def losses(self) -> Tensor:
        """`[B, T]` under the edits of the moment, differentiable; only the tail is run."""
        hidden, head = self._session.read_body(self._text, self._tail)
        return losses_of(self._session, self._context, hidden, head)

    @torch.no_grad()
    def end(self) -> tuple[Tensor, Tensor]:
        """As `begin`, by the tail; what it changes in the cache is changed there."""
        return self._read(self._tail, nullcontext())

    def undo(self) -> None:
        """Nothing was learned: `generate` reads the prompt itself, to the bits of the base model."""
        self._session.cache = None

    @torch.no_grad()
    def next_token(self) -> Tensor:
        """`[B, V]` log-probabilities of the next token, where edits touch no token but the last."""
        session, context = self._session, self._context
        if session.hands_over:
            return log_probabilities(session.peek(context), context)
        hidden, head = session.read_body(context, self._tail)
        return log_probabilities(head(hidden[:, -1:])[:, 0], context)

    def _read(self, replay: Tail | None, capture: AbstractContextManager[None]) -> tuple[Tensor, Tensor]:
        session, context = self._session, self._context
        with capture:
            hidden, head = session.read_body(self._text, replay, fill=session.hands_over)
        losses = losses_of(session, context, hidden, head)
        if session.hands_over:
            return losses, log_probabilities(session.peek(context), context)
        return losses, log_probabilities(head(hidden[:, -1:])[:, 0], context)
