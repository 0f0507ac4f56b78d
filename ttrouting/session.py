"""Everything that changes during one adapted call. Nothing of it lives on a module, a class or a global."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.endings import Endings
from ttrouting.errors import CoverageError, ModelBusy
from ttrouting.head import Body, Head
from ttrouting.kernels.switch import skipping
from ttrouting.patches import Patches
from ttrouting.rows import Rows, make_rows
from ttrouting.sites import Site
from ttrouting.strategy import DecodingRun, RoutingRun, overrides
from ttrouting.streams import first_stream, repeat_inputs
from ttrouting.tail import Tail
from ttrouting.taps import Call, SiteTap

if TYPE_CHECKING:
    from ttrouting.plan import Plan

NO_ENDINGS = Endings()
Observer = Callable[[Site, Call, Tensor, Tensor, Rows], None]


class Session:
    """One call: its sequences, its runs, its taps.

    Attributes:
        sequences: `B`, rows of every run's state.
        keys: `[B]` int64, a number for each sequence from its prompt (for keyed random choices).
        rows: layout of the forward that is running, None outside one.
        hidden: input of the experts of the site that is running, `[N, H]`.
        observers: called after each selection; they look and do not touch.
        hands_over: whether a cache that `fill` filled can be given to `generate`.
    """

    def __init__(
        self, plan: Plan, mask: Tensor, keys: Tensor, endings: Endings = NO_ENDINGS, hands_over: bool = False
    ) -> None:
        self.plan = plan
        self.hands_over = hands_over
        self.model = plan.target.model
        self.sites = plan.target.sites
        self.sequences = mask.shape[0]
        self.keys = keys
        self.rows: Rows | None = None
        self.hidden: Tensor | None = None
        self.observers: list[Observer] = []
        self.decoding: DecodingRun | None = None
        self.edits_logits: list[RoutingRun] = []
        self.edits_scores: list[RoutingRun] = []
        self.edits_selection: list[RoutingRun] = []
        self.cache: Any = None
        self._mask = mask  # [B, T] bool, the prompt's real tokens
        self.endings = endings
        self._over = torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)  # [B] an end was read
        self._live = ~self._over  # [B] the last token read was text
        # a decode step reads no number that changes, but tensors and flags: it would be compiled anew for each
        self._begin = 0  # columns of the prompt that the cache holds
        self._prompt_read = False
        self._position = mask.sum(1)  # [B] of the next token, once the prompt is read
        self._refilling = False
        self._again = False  # a backward pass recomputes
        self._expected = torch.zeros((), dtype=torch.int64)
        self._counted = [torch.zeros((), dtype=torch.int64) for _ in self.sites]
        self._patches = Patches()
        self._forward: Callable[..., Any] = self.model.forward
        self.runs = [strategy.start(self) for strategy in plan.routing]
        self._enabled = True
        self.enable()
        if plan.decoding is not None:
            self.decoding = plan.decoding.start(self)

    # --- taps on and off ----------------------------------------------------------------------------

    def enable(self, only: list[RoutingRun] | None = None) -> None:
        """Choose which runs edit: all of them, or those given."""
        runs = self.runs if only is None else only
        self.edits_logits = [r for r in runs if overrides(r, "edit_logits")]
        self.edits_scores = [r for r in runs if overrides(r, "edit_scores")]
        self.edits_selection = [r for r in runs if overrides(r, "edit_selection")]

    @contextmanager
    def without(self, *runs: RoutingRun) -> Iterator[None]:
        """Forwards in this block run without the edits of these runs."""
        before = self.edits_logits, self.edits_scores, self.edits_selection
        self.enable([r for r in self.runs if r not in runs])
        try:
            yield
        finally:
            self.edits_logits, self.edits_scores, self.edits_selection = before

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Observers of before do not see the forwards in this block."""
        before, self.observers = self.observers, []
        try:
            yield
        finally:
            self.observers = before

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Taps are on inside this block, dropped experts are not computed, and all is as before after it."""
        drops = self.decoding is not None or any(overrides(run, "edit_selection") for run in self.runs)
        with skipping(self.model) if drops else nullcontext():
            try:
                self._forward = self.model.forward
                for site in self.sites:
                    SiteTap(site, self).install(self._patches)
                self._patches.forward(self.model, self._make_forward)
                yield
            finally:
                self._patches.undo()
                self.rows = None

    # --- forwards -------------------------------------------------------------------------------------

    def _make_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)
        owner = threading.get_ident()

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # a compiled forward runs where it was called from, and cannot trace this question
            if not torch.compiler.is_compiling() and threading.get_ident() != owner:
                raise ModelBusy(
                    "This model is inside an adapted call of another thread, whose routing would apply here too. "
                    "Wait for that call to end."
                )
            kwargs.update(zip(names, args, strict=False))
            return self._decode_forward(original, kwargs)

        return forward

    def _decode_forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward of `generate`: works out the rows, doubles them for a decoding strategy."""
        tokens = kwargs.get("input_ids")
        shape = tokens.shape if tokens is not None else kwargs["inputs_embeds"].shape
        batch, length = int(shape[0]), int(shape[1])
        cache = kwargs.get("past_key_values")
        if cache is None or cache is not self.cache:
            self._begin, self._prompt_read = 0, False
        streams = self.plan.decoding.streams if self.plan.decoding is not None else 1
        valid, start = self._layout(tokens, batch, length)
        rows = make_rows(valid, self.sequences, start, streams)
        if streams > 1:
            kwargs = repeat_inputs(kwargs, batch, streams)
        out = self._run(original, rows, kwargs)
        self.cache = getattr(out, "past_key_values", None)
        if streams > 1 and self.decoding is not None:
            logits = out.logits.view(streams, batch, *out.logits.shape[1:])  # [streams, B, S, V]
            combined = self.decoding.combine(logits)
            out = first_stream(out, batch * streams, batch)
            out.logits = combined
        return out

    def _layout(self, tokens: Tensor | None, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """`valid [batch, length]` and the position of the first token of each row."""
        if self._prompt_read:
            start = self._position
            self._position = start + length
            return self._after_prompt(tokens, self._over, batch, length), start
        expand = batch // self._mask.shape[0]
        mask = self._mask if expand == 1 else self._mask.repeat_interleave(expand, 0)
        end = self._begin + length
        start, inside = mask[:, : self._begin].sum(1), mask[:, self._begin : end]
        beyond = length - inside.shape[1]
        self._begin, self._prompt_read = end, end >= mask.shape[1]
        if beyond == 0:
            self._position = start + inside.sum(1)
            return inside, start
        later = self._after_prompt(tokens, torch.zeros_like(mask[:, 0]), batch, beyond)
        self._position = start + inside.sum(1) + beyond
        return torch.cat([inside, later], 1), start

    def _after_prompt(self, tokens: Tensor | None, over: Tensor, batch: int, length: int) -> Tensor:
        """`[batch, length]` bool: which of the last tokens are text; `over [batch]`: an end was read before."""
        if tokens is None:
            return torch.ones(batch, length, dtype=torch.bool, device=over.device)
        new = tokens[:, -length:].to(over.device)
        ends = self.endings.over(new)  # [batch, length]
        if over.shape[0] == batch:
            ends |= over[:, None]
        text = ~(ends | self.endings.padding(new))
        # contiguous: a compiled step takes one stride
        self._over, self._live = ends[:, -1].contiguous(), text[:, -1].contiguous()
        return text

    def _run(self, forward: Callable[..., Any], rows: Rows, kwargs: dict[str, Any]) -> Any:
        self.rows = rows
        self._expected.add_(rows.tokens)
        try:
            return forward(**kwargs)
        finally:
            self.rows = None

    def read(self, context: Context, keep: Tensor | None = None, replay: Tail | None = None) -> Any:
        """A forward of the model over a context, single stream, taps live, no cache.

        Args:
            context: what to read; its rows may be several neighbouring ones for each sequence of the session.
            keep: positions whose logits are wanted, `[P]`; all if None.
            replay: run its layers only, from what it captured when the same context was read.
        """
        if replay is not None:
            return self._replayed(context, keep, replay, False)
        return self._run(self._forward, self._whole(context), self._reading(context, keep, False))

    def score(self, context: Context, scored: Tensor) -> Tensor:
        """Logits `[B, P, V]` at the last `P` positions of texts that are as many as the sequences; no cache.

        A decoding strategy's streams are combined as for log-likelihoods.

        Args:
            scored: `[B, P]` bool, positions whose logits count.
        """
        last = scored.shape[1]
        keep = torch.arange(context.ids.shape[1] - last, context.ids.shape[1], device=context.ids.device)
        if self.decoding is None:
            logits: Tensor = self.read(context, keep).logits
            return logits[:, -last:]
        streams, batch = self.decoding.strategy.streams, context.ids.shape[0]
        rows = make_rows(context.mask, self.sequences, 0, streams)
        inputs = repeat_inputs(self._reading(context, keep, False), batch, streams)
        logits = self._run(self._forward, rows, inputs).logits[:, -last:]
        return self.decoding.score(logits.view(streams, batch, *logits.shape[1:]), scored)

    def _replayed(self, context: Context, keep: Tensor | None, replay: Tail, use_cache: bool) -> Any:
        rows = self._whole(context)
        for site in replay.skipped:  # their tokens were routed when the context was captured
            self.count(site, rows.tokens)
        with replay.replay():
            return self._run(self._forward, rows, self._reading(context, keep, use_cache))

    def _whole(self, context: Context) -> Rows:
        return make_rows(context.mask, self.sequences, 0)

    def _reading(self, context: Context, keep: Tensor | None, use_cache: bool) -> dict[str, Any]:
        inputs = {**self.context_inputs(context), "use_cache": use_cache}
        if keep is not None and "logits_to_keep" in inspect.signature(self._forward).parameters:
            inputs["logits_to_keep"] = keep
        return inputs

    def tail(self, first: int, recompute: bool = False) -> Tail:
        """The layers from this site up, to be captured and replayed; `recompute` bounds memory (see `Tail`)."""
        return Tail(self.plan.target, first, self._forward, self._recomputing if recompute else None)

    def _recomputing(self) -> AbstractContextManager[None]:
        """Layers that run again in a backward pass do so as in the forward that is running now, and count once."""
        rows = self.rows

        @contextmanager
        def again() -> Iterator[None]:
            self.rows, self._again = rows, True
            try:
                yield
            finally:
                self.rows, self._again = None, False

        return again()

    def follow(self, tail: Tail) -> None:
        """Keep what decoding hands up to a tail, until the end of the call. Not where decoding is compiled."""
        compiled = (getattr(self._forward, "_torchdynamo_orig_callable", None), self.model._compiled_call_impl)
        if compiled == (None, None):
            tail.follow(self._patches)

    def read_streams(self, context: Context) -> tuple[Tensor, Head]:
        """As `read_body`, with all streams of the decoding strategy: `[streams * B, T, D]`, one after another."""
        streams = 1 if self.plan.decoding is None else self.plan.decoding.streams
        batch = context.ids.shape[0]
        rows = make_rows(context.mask, self.sequences, 0, streams)
        whole = repeat_inputs(self._reading(context, None, False), batch, streams)
        if not self.plan.target.proven.get("head", False):
            return self._run(self._forward, rows, whole).logits, lambda logits: logits
        body = Body()
        bare = repeat_inputs(self._reading(context, context.ids.new_empty(0), False), batch, streams)
        with body.caught(self.model):
            self._run(self._forward, rows, bare)
        return body.output.last_hidden_state, body.head(self.model, self._forward, whole)

    def read_body(self, context: Context, replay: Tail | None = None, fill: bool = False) -> tuple[Tensor, Head]:
        """As `read`, but last hidden states `[B, T, D]` and the head that makes logits of them, a few at a time.

        Where a model's head and body cannot be run apart (see `check_head`): logits, and a head that does nothing.

        Args:
            fill: read into the KV cache from which `generate` goes on; a replay renews its layers' part of it.
        """
        read = self.fill if fill else self.read
        if not self.plan.target.proven.get("head", False):
            return read(context, None, replay).logits, lambda logits: logits
        body = Body()
        with body.caught(self.model):
            read(context, context.ids.new_empty(0), replay)
        inputs = {**self.context_inputs(context), "use_cache": False}
        return body.output.last_hidden_state, body.head(self.model, self._forward, inputs)

    def fill(self, context: Context, keep: Tensor | None = None, replay: Tail | None = None) -> Any:
        """As `read`, into the session's KV cache; without a replay that is a new one."""
        if replay is None:
            return self._decode_forward(self._forward, self._reading(context, keep, True))
        out = self._replayed(context, keep, replay, True)
        for number, layer in enumerate(out.past_key_values.layers):
            if _holds_something(vars(layer)):  # those below were not run
                self.cache.layers[number] = layer
        return out

    def context_inputs(self, context: Context) -> dict[str, Any]:
        """The model inputs for a context as `generate` would prepare them."""
        kwargs: dict[str, Any] = dict(context.inputs, input_ids=context.ids, attention_mask=context.mask.long())
        prepare = type(self.model).__dict__.get("_prepare_position_ids_for_generation")
        if prepare is None and "position_ids" in inspect.signature(self._forward).parameters:
            kwargs["position_ids"] = (context.mask.long().cumsum(-1) - 1).clamp_min(0)
        return kwargs

    def peek(self, context: Context) -> Tensor:
        """Logits after the last token of the prompts, `[B, V]`, from a copy of the filled cache."""
        kwargs = self.context_inputs(context)
        for name in ("input_ids", "position_ids"):
            if name in kwargs:
                kwargs[name] = kwargs[name][:, -1:]
        kwargs |= {"past_key_values": copy.deepcopy(self.cache), "use_cache": True}
        last = context.mask[:, -1:]
        rows = make_rows(last, self.sequences, context.mask.sum(1) - 1)
        logits: Tensor = self._run(self._forward, rows, kwargs).logits
        return logits[:, -1]

    def refill(self, context: Context) -> None:
        """Compute the KV cache of all but the last token of `context` anew, in place.

        `generate` keeps its reference to the cache object, so the object stays and its content goes.
        """
        cache = self.cache
        kwargs = {**self.context_inputs(context.head()), "use_cache": True}
        if "logits_to_keep" in inspect.signature(self._forward).parameters:
            kwargs["logits_to_keep"] = 1
        if getattr(cache, "is_compileable", False):
            cache.reset()
            kwargs["past_key_values"] = cache
        self.cache = None
        self._refilling = True
        out = self._decode_forward(self._forward, kwargs)
        self._refilling = False
        if out.past_key_values is not cache:
            cache.__dict__.update(out.past_key_values.__dict__)
        self.cache = cache

    # --- sequences ------------------------------------------------------------------------------------

    def expand(self, repeats: int) -> None:
        """Each sequence becomes `repeats` neighbouring rows (beams, returned sequences)."""
        if repeats == 1:
            return
        self.sequences *= repeats
        if self.cache is not None:
            self.cache.batch_repeat_interleave(repeats)
        self.keys = self.keys.repeat_interleave(repeats)
        self._mask = self._mask.repeat_interleave(repeats, 0)
        self._over = self._over.repeat_interleave(repeats)
        self._live = self._live.repeat_interleave(repeats)
        self._position = self._position.repeat_interleave(repeats)
        for run in self.runs:
            run.expand(repeats)
        if self.decoding is not None:
            self.decoding.expand(repeats)

    @property
    def decides(self) -> bool:
        """Whether the running forward decides on a new token: a part of a prompt and a refilled cache do not."""
        return self._prompt_read and not self._refilling

    @property
    def live(self) -> Tensor:
        """`[B]` bool: sequences that had not ended at the last forward."""
        return self._live

    def ended(self, ids: Tensor) -> Tensor:
        """`[B]` bool: sequences that are at their end in the text so far, `ids [B, T]`."""
        return self.endings.outside(ids[:, self._mask.shape[1] :])[:, -1]

    # --- coverage -------------------------------------------------------------------------------------

    def count(self, site: Site, tokens: int) -> None:
        """A router saw `tokens` tokens."""
        if not self._again:
            self._counted[site.index].add_(tokens)

    def check_coverage(self) -> None:
        """Raise unless every site routed every token of every forward under the taps."""
        expected = int(self._expected)
        missed = [s for s in self.sites if int(self._counted[s.index]) != expected]
        if missed:
            worst = missed[0]
            raise CoverageError(
                f"{len(missed)} of {len(self.sites)} MoE layers did not see every token: {worst.name} routed "
                f"{int(self._counted[worst.index])} of {expected}. The output is not fully adapted and "
                "is withheld. A fused or hub kernel may bypass the router: load with use_kernels=False."
            )


def _holds_something(value: Any) -> bool:
    """Whether a tensor with entries is among (nested) attributes; a single number is a setting (a window's size)."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.numel() > 0
    return isinstance(value, dict) and any(_holds_something(v) for v in value.values())
