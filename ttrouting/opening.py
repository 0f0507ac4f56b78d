"""The prompt as an adaptation first reads it: once, with a last token that can be read again.

Legend: `B` sequences, `V` vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ttrouting.context import Context
from ttrouting.session import Session


class Opening:
    """All but the last token stand in the session's KV cache, from which `generate` goes on: no second prefill.

    Where that cannot be (see `generation.can_hand_over`) each reading is one of the whole prompt.
    """

    def __init__(self, session: Session, context: Context) -> None:
        self._session, self._context = session, context
        if session.hands_over:
            session.prefill(context)

    def log_probabilities(self) -> Tensor:
        """`[B, V]` of the token after the prompt, with the edits of the moment at its last token."""
        session, context = self._session, self._context
        if session.hands_over:
            logits = session.peek(context)
        else:
            last = context.ids.new_tensor([context.ids.shape[1] - 1])
            logits = session.read(context, last).logits[:, -1]
        return logits.float().to(context.ids.device).log_softmax(-1)
