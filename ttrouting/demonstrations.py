"""How much each expert contributes to some texts (EASY-EP, arXiv 2504.06792, eq. for expert scores).

Legend: `N` tokens, `H` hidden size, `L` layers, `E` experts, `K` per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttrouting.errors import UnsupportedModelError
from ttrouting.plan import Plan
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.taps import Call
from ttrouting.target import Target
from ttrouting.texts import text_contexts


def expert_scores(target: Target, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """`[L, E]` fp32: `sum_t s_t g_it ||e_i(h_t)||_2` over the tokens that chose expert i.

    Raises:
        UnsupportedModelError: experts that cannot be run one column at a time (Llama 4, JetMoe).
    """
    odd = next((s for s in target.sites if s.interface != "experts" or s.experts is None), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"Expert masks from demonstrations run experts one by one, which {odd.name} "
            f"({type(odd.block).__name__}) does not allow. Give a mask of your own: ttr.ExpertMask(mask)."
        )
    totals = torch.zeros(len(target.sites), max(s.num_experts for s in target.sites))

    def observe(site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        hidden = session.hidden
        if hidden is None:
            return
        flat = hidden.reshape(-1, hidden.shape[-1])  # [N, H]
        outputs = [_column(site, hidden, ids, k) for k in range(ids.shape[1])]  # K x [N, H]
        mixed = sum(w[:, None].float() * o.float() for w, o in zip(weights.unbind(1), outputs, strict=True))
        shift = 1 - F.cosine_similarity(flat.float(), flat.float() + mixed, dim=-1)  # [N]
        valid = rows.valid.flatten().to(shift.device)
        for weight, output, column in zip(weights.unbind(1), outputs, ids.unbind(1), strict=True):
            gain = shift * weight.float() * output.float().norm(dim=-1) * valid  # [N]
            totals[site.index].index_add_(0, column.cpu(), gain.to(totals))

    for context in text_contexts(target.model, tokenizer, texts):
        session = Session(Plan(target, (), None), context.mask, context.ids[:, 0])
        session.observers.append(observe)
        with torch.no_grad(), session.installed():
            session.read(context, context.ids.new_tensor([context.ids.shape[1] - 1]))
        session.check_coverage()
    return totals


def _column(site: Site, hidden: Tensor, ids: Tensor, column: int) -> Tensor:
    """Output of the experts in one column, as if each had weight 1: `[N, H]`."""
    experts = cast(nn.Module, site.experts)  # `expert_scores` has refused layers without
    one = ids[:, column : column + 1]
    weight = torch.ones(one.shape, dtype=site.weight_dtype, device=one.device)
    # a second column without weight: LongCat cannot take a single one
    pair, weights = torch.cat([one, one], 1), torch.cat([weight, torch.zeros_like(weight)], 1)
    # `forward`, not the module: its hooks are the taps that are running now
    return experts.forward(hidden, pair, weights).reshape(-1, hidden.shape[-1])
