"""The loss of a context under the routing of the moment, and a check that it can be differentiated.

Legend: `B` sequences, `T` tokens, `P` positions predicted, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.head import Head, chunked_losses
from ttrouting.session import Session
from ttrouting.tail import Tail

MIN_LOSS_TOKENS = 16  # of a sequence, under which nothing is adapted


def token_losses(session: Session, context: Context, replay: Tail | None = None) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy of a context; with `replay` its layers alone are run, as in `Session.read`.

    Returns:
        `[B, T]` loss of predicting each token in nats (0 where `context.targets` is off everywhere in the
        batch), and `[B, V]` log-probabilities of the token after the context. Differentiable once.
    """
    hidden, head = session.read_body(context, replay)  # [B, T, D]
    losses = losses_of(session, context, hidden, head)
    return losses, log_probabilities(head(hidden[:, -1:])[:, 0], context)


def losses_of(session: Session, context: Context, hidden: Tensor, head: Head) -> Tensor:
    """`[B, T]` as in `token_losses`, from the last hidden states of at least all tokens but the last."""
    wanted = context.targets.any(0).nonzero().flatten()  # [P] columns that some sequence predicts
    read = hidden[:, (wanted - 1).to(hidden.device)]  # [B, P, D]
    loss = chunked_losses(read, context.ids[:, wanted], head)
    return loss.new_zeros(context.ids.shape).index_copy(1, wanted, loss)


def log_probabilities(logits: Tensor, context: Context) -> Tensor:
    """`[B, V]` in fp32 at least, on the context's device."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.to(context.ids.device).log_softmax(-1)


def mean_loss(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the chosen tokens of each sequence: `[B, T]`, `[B, T]` bool -> `[B]` (0 where none)."""
    # chosen, not multiplied: what stands at padding may be no number
    return torch.where(mask, losses, 0).sum(1) / mask.sum(1).clamp_min(1)


def split_targets(targets: Tensor, hold_back: bool) -> tuple[Tensor, Tensor]:
    """Tokens to fit and tokens to judge by: the last max(8, quarter) of each sequence are held back.

    Args:
        targets: `[B, T]` bool. hold_back: False puts every token into the fit.
    """
    if not hold_back:
        return targets, torch.zeros_like(targets)
    total = targets.sum(1, keepdim=True)  # [B, 1]
    held = torch.maximum(total // 4, torch.full_like(total, 8))
    later = total - targets.long().cumsum(1)  # targets after this token
    judge = targets & (later < held)
    return targets & ~judge, judge


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
