"""The three taps of a site: router logits, choice scores, selection. All edits happen here.

Legend: `N` tokens of one forward, `C` columns of the router's linear, `E` experts, `K` per token.
Edits see fp32 (see `Site.edit_dtype`); weights are cast back to what the experts expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttrouting.errors import CoverageError
from ttrouting.interfaces import INTERFACES
from ttrouting.masking import MASKED
from ttrouting.patches import Patches
from ttrouting.scoring import probabilities, raw_scores
from ttrouting.sites import Site

if TYPE_CHECKING:
    from ttrouting.rows import Rows
    from ttrouting.session import Session

TOPK = (torch.topk, torch.Tensor.topk)


class Call:
    """What one site saw in one forward. Attributes fill up as the forward goes on.

    Attributes:
        site: where.
        logits: `[N, E]` router logits after edits.
        choice: `[N, E]` scores the experts were chosen by, after edits; logits where there is no top-k.
        ids, weights: `[N, K]` what the family chose, before any edit of the selection.
    """

    __slots__ = ("choice", "ids", "logits", "site", "weights")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.logits: Tensor | None = None
        self.choice: Tensor | None = None
        self.ids: Tensor | None = None
        self.weights: Tensor | None = None

    def _seen(self) -> Tensor:
        if self.logits is None:
            raise CoverageError(
                f"The experts of {self.site.name} ran without its router having been seen. A fused or hub "
                "kernel may bypass the router: load the model with use_kernels=False."
            )
        return self.logits

    def chosen(self) -> tuple[Tensor, Tensor]:
        """`(ids, weights)`, `[N, K]` each, as the family chose."""
        if self.ids is None or self.weights is None:
            raise CoverageError(f"The selection of {self.site.name} was asked for before the router had made it.")
        return self.ids, self.weights

    def probabilities(self) -> Tensor:
        """`pi [N, E]` fp32, the family's scores before bias, normalised to sum 1."""
        return probabilities(self.site.scoring, self._float(), self.choice)

    def raw_scores(self) -> Tensor:
        """`[N, E]` the family's scores before bias, not normalised."""
        return raw_scores(self.site.scoring, self._float(), self.choice)

    def _float(self) -> Tensor:
        logits = self._seen()
        return logits if logits.dtype == torch.float64 else logits.float()

    def ranking(self) -> Tensor:
        """`[N, E]` scores that order the experts as the family's own choice does."""
        return self._seen() if self.choice is None else self.choice


class _TapMode(TorchFunctionMode):
    """Meets the last linear inside a router and the top-k that chooses, in the router or in its block."""

    def __init__(self, tap: SiteTap, linears: bool) -> None:
        super().__init__()
        self.tap = tap
        self.linears_left = tap.site.linear_index if linears else -1
        self.topks_left = tap.site.topk_index

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self.linears_left >= 0:
            out = func(*args, **kwargs)
            self.linears_left -= 1
            return self.tap.on_logits(out) if self.linears_left < 0 else out
        if func in TOPK and self.topks_left >= 0:
            self.topks_left -= 1
            if self.topks_left < 0:
                args, kwargs = self.tap.on_topk(args, kwargs)
        return func(*args, **kwargs)


class SiteTap:
    """The taps of one site during one session."""

    def __init__(self, site: Site, session: Session) -> None:
        self.site = site
        self.session = session
        self.call = Call(site)
        self.routed: Rows | None = None  # the forward in which the router was last seen
        self.native: Tensor | None = None  # the linear's own output, to be reported
        self.edited: Tensor | None = None  # what the router computed with instead
        self.untouched: Tensor | None = None  # [N] bool, tokens whose logits and scores no edit changed

    def install(self, patches: Patches) -> None:
        """Attach to router and experts; `patches` takes it back."""
        patches.forward(self.site.router, self._make_router)
        if self.site.topk_in == "block":
            patches.forward(self.site.block, self._make_block)
        if self.site.interface == "experts" and self.site.experts is not None:
            patches.pre_hook(self.site.experts, self._before_experts)

    def _make_router(self, original: Callable[..., Any]) -> Callable[..., Any]:
        direct = self._direct_router()
        if direct is not None:
            return direct(original)
        interface = INTERFACES[self.site.interface]
        in_arguments = self.site.interface == "experts"

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.session.rows is None:
                return original(*args, **kwargs)
            self.call = Call(self.site)
            self.native = self.edited = self.untouched = None
            with _TapMode(self, linears=True):
                out = original(*args, **kwargs)
            if self.untouched is not None:
                out = self._restore_rows(out, original(*args, **kwargs))
            if not in_arguments and (read := interface.read_router_output(out, self.site.top_k)) is not None:
                new = self.on_selection(*read)
                if new is not None:
                    out = interface.write_router_output(out, *new)
            return self._report_native(out)

        return forward

    def _direct_router(self) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """A forward of plain operations; None where the family needs a function mode, or something is in between."""
        route, router, session = self.site.direct, self.site.router, self.session
        # an offloaded weight comes with accelerate's forward; a caller's own forward is to run
        if route is None or "forward" in vars(router) or router.weight.is_meta:
            return None

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if session.rows is None or len(args) != 1 or kwargs:
                    return original(*args, **kwargs)
                self.call = Call(self.site)
                self.native = self.edited = self.untouched = None
                return route(router, args[0], self.on_logits, self._on_scores)

            return forward

        return make

    def _on_scores(self, scores: Tensor) -> Tensor:
        """Score tap of a direct router."""
        if not self.session.edits_scores:
            self.call.choice = scores
            return scores
        (edited,), _ = self.on_topk((scores,), {})
        return cast(Tensor, edited)

    def _make_block(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.session.rows is None:
                return original(*args, **kwargs)
            with _TapMode(self, linears=False):
                return original(*args, **kwargs)

        return forward

    def _restore_rows(self, edited: Any, native: Any) -> Any:
        """Rows without an edit as a native run gives them: scored in fp32 they could differ by a rounding."""
        untouched = cast(Tensor, self.untouched)  # [N]

        def pick(new: Any, old: Any) -> Any:
            if not isinstance(new, Tensor) or new is self.edited or old.shape[:-1].numel() != untouched.numel():
                return new
            return torch.where(untouched.view(old.shape[:-1])[..., None], old, new.to(old.dtype))

        if not isinstance(edited, tuple):
            return pick(edited, native)
        return tuple(pick(new, old) for new, old in zip(edited, native, strict=True))

    def _report_native(self, out: Any) -> Any:
        """Give back the family's own logits as reported logits: edits are ours, not the model's."""
        if self.edited is None or self.site.topk_in == "block" or not isinstance(out, tuple):
            return out
        return tuple(self.native if t is self.edited else t for t in out)

    def _before_experts(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.session.rows is None:
            return None
        hidden, ids, weights, *rest = args
        self.session.hidden = hidden
        new = self.on_selection(ids, weights)
        return None if new is None else ((hidden, *new, *rest), kwargs)

    # --- the taps ---------------------------------------------------------------------------------

    def on_logits(self, out: Tensor) -> Tensor:
        """Logit tap: `out [..., C]` from the last linear of the router."""
        site, session = self.site, self.session
        rows = session.rows
        flat = out.flatten(0, -2)  # [N, C]
        if rows is None or flat.shape[0] != rows.tokens:
            raise CoverageError(
                f"{site.name} routes {flat.shape[0]} tokens where the forward has "
                f"{rows.tokens if rows else 0}: the model hands it a part of the tokens (pictures beside text?), "
                "so their sequences are unknown. Adapt text-only inputs."
            )
        session.count(site, flat.shape[0])
        self.routed = rows
        if not session.edits_logits and site.topk_in != "logits":
            self.call.logits = flat[:, : site.num_experts]
            return out
        logits = flat[:, : site.num_experts].to(site.edit_dtype)  # [N, E]
        for run in session.edits_logits:
            logits = run.edit_logits(site, logits, rows)
        if site.topk_in == "logits" and session.edits_scores:
            for run in session.edits_scores:
                logits = run.edit_scores(site, logits, rows)
            logits = logits.clamp_min(MASKED)
        # an optimisation needs the gradient through every row, also through deltas that are 0 so far
        if site.half_scores and not logits.requires_grad:
            self.untouched = (logits == flat[:, : site.num_experts]).all(-1)
        self.call.logits = logits
        if site.topk_in == "logits":
            self.call.choice = logits
        if flat.shape[1] > site.num_experts:  # columns of shared experts (Inkling) are not edited
            logits = torch.cat([logits, flat[:, site.num_experts :].to(site.edit_dtype)], -1)
        self.native, self.edited = out, logits.view(out.shape)
        return self.edited

    def on_topk(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Score tap: the arguments of the top-k that chooses the experts."""
        scores = args[0] if args else kwargs["input"]
        flat = scores.flatten(0, -2)  # [N, E]
        rows = self.session.rows
        if rows is not None and self.session.edits_scores:
            edited = flat
            for run in self.session.edits_scores:
                edited = run.edit_scores(self.site, edited, rows)
            if self.untouched is not None:
                self.untouched &= (edited == flat).all(-1)
            flat = edited
            scores = edited.view(scores.shape)
            if args:
                args = (scores, *args[1:])
            else:
                kwargs = {**kwargs, "input": scores}
        self.call.choice = flat
        return args, kwargs

    def on_selection(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """Selection tap: `ids [N, K]`, `weights [N, K]` on their way into the experts."""
        site, session, rows = self.site, self.session, self.session.rows
        if rows is None:
            return None
        if self.routed is not rows:  # a call of an earlier forward would pass for this one's
            self.call = Call(site)
        self.call._seen()
        changed = False
        if weights.dtype != site.weight_dtype:  # fp32 logits made fp32 weights
            weights = weights.to(site.weight_dtype)
            changed = True
        if session.edits_selection or (session.decoding is not None and rows.streams > 1):
            wide = weights if weights.dtype == torch.float64 else weights.float()
            self.call.ids, self.call.weights = ids, wide
            for run in session.edits_selection:
                ids, wide = run.edit_selection(site, self.call, ids, wide, rows)
            if session.decoding is not None and rows.streams > 1:
                ids, wide = session.decoding.route(site, self.call, ids, wide, rows)
            if site.real_experts < site.num_experts:
                skipped = ids >= site.real_experts
                ids, wide = ids.masked_fill(skipped, 0), wide.masked_fill(skipped, 0)
            weights = wide.to(site.weight_dtype)
            if (missing := site.least_columns - ids.shape[1]) > 0:
                # the last id is one of LongCat's zero experts: nothing is computed for it
                ids, weights = F.pad(ids, (0, missing), value=site.num_experts - 1), F.pad(weights, (0, missing))
            changed = True
        for observer in session.observers:
            observer(site, self.call, ids, weights, rows)
        return (ids, weights) if changed else None
