"""The loss of a context under the routing of the moment, and a check that it can be differentiated.

Legend: `B` sequences, `T` tokens, `P` positions kept, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.head import chunked_losses, cross_entropy
from ttrouting.session import Session
from ttrouting.tail import Tail


def token_losses(session: Session, context: Context, replay: Tail | None = None) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy of a context; with `replay` its layers alone are run, as in `Session.read`.

    Returns:
        `[B, T]` loss of predicting each token in nats (0 where `context.targets` is off everywhere in the
        batch), and `[B, V]` log-probabilities of the token after the context. Differentiable once.
    """
    wanted = context.targets.any(0).nonzero().flatten()  # [P] columns that some sequence predicts
    if session.plan.target.proven.get("head", False):
        hidden, head = session.read_body(context, replay)  # [B, T, D]
        labels = context.ids[:, wanted]
        loss = chunked_losses(hidden[:, (wanted - 1).to(hidden.device)], labels, head, session.vocabulary)
        final = head(hidden[:, -1:])
    else:
        keep = torch.cat([wanted - 1, wanted.new_tensor([context.ids.shape[1] - 1])])
        logits = session.read(context, keep, replay).logits
        if logits.shape[1] != keep.numel():
            logits = logits[:, keep.to(logits.device)]
        loss, final = cross_entropy(logits[:, :-1], context.ids[:, wanted]), logits[:, -1:]
    losses = loss.new_zeros(context.ids.shape).index_copy(1, wanted, loss)
    final = (final if final.dtype == torch.float64 else final.float()).to(context.ids.device)
    return losses, final[:, 0].log_softmax(-1)


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
