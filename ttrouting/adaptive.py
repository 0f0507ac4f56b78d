"""`adapt`: a model whose calls run under strategies, and which is its old self outside them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ttrouting.choices import Continuation, Likelihood, check_choices, read_choices
from ttrouting.context import Context
from ttrouting.errors import ConfigError, ModelBusy, UnsupportedCallError
from ttrouting.generation import (
    EveryInterval,
    can_hand_over,
    check_generate_call,
    check_ids,
    check_inputs,
    check_model_call,
    check_prompt,
    experts_implementation,
    find_endings,
    infer_mask,
    most_new_tokens,
    option,
    using_experts,
)
from ttrouting.gradients import edits_only
from ttrouting.keyed import sequence_keys
from ttrouting.plan import Plan, make_plan
from ttrouting.report import Report
from ttrouting.session import Session
from ttrouting.sites import Site, find_sites
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy, overrides
from ttrouting.target import Target
from ttrouting.trace import RoutingTrace
from ttrouting.tracing import TraceRecorder
from ttrouting.usage import UsageMeter, returned_rows

# which models are adapted now; weak, so that a forgotten adapter or model frees its place
_adapters: weakref.WeakKeyDictionary[Any, weakref.ref[AdaptiveModel]] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def adapt(
    model: Any,
    strategies: Strategy | str | Sequence[Strategy | str],
    *,
    no_harm: bool = True,
    tokenizer: Any = None,
) -> AdaptiveModel:
    """Wrap a transformers MoE model so that its calls run under routing and decoding strategies.

    Args:
        model: any supported model, on any devices, in eval mode.
        strategies: one or several, as instances or names. Routing strategies compose in the order that
            their classes state; at most one decoding strategy.
        no_harm: roll an adaptation back, per sequence, where it does not help on held-back tokens.
        tokenizer: needed where `loss_on` is a pattern or `"assistant"`.

    Returns:
        An `AdaptiveModel`. It touches nothing until it is called, and takes everything back after each call.

    Raises:
        NotMoEError, UnsupportedModelError, ConfigError, CompositionError: see the message.
        ModelBusy: the model is adapted already.
    """
    if isinstance(model, AdaptiveModel):
        raise ModelBusy("This model is adapted already. Call .close() on it, then adapt the model itself.")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"adapt needs a loaded model, got {model!r}. Load it first: AutoModelForCausalLM.from_pretrained(...)."
        )
    with _registry_lock:
        reference = _adapters.get(model)
        holder = reference() if reference is not None else None
        if holder is not None and not holder.closed:
            raise ModelBusy(
                f"{type(model).__name__} is adapted already by {holder!r}. Call .close() on that adapter first."
            )
        if holder is not None and holder.running:
            raise ModelBusy(f"{holder!r} is closed, but a call of it is still running. Wait for that call to end.")
        target = Target(model, find_sites(model), tokenizer, no_harm)
        adapted = AdaptiveModel(make_plan(target, strategies))
        _adapters[model] = weakref.ref(adapted)
    return adapted


class AdaptiveModel:
    """A model under strategies. Not a module: every other attribute is the model's own.

    Use as a context manager, or call `close()` when done. One call at a time: a second thread gets
    `ModelBusy`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._paused = 0
        self._traces: list[RoutingTrace] | None = None
        self._report = Report()
        self._state = AdaptationState()
        self.closed = False

    # --- what the model was asked -------------------------------------------------------------------

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        state: AdaptationState | None = None,
        loss_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """`model.generate` under the strategies: the same arguments, the same return types.

        Args:
            inputs: `[B, T]` token ids, padded on the left (or `input_ids=`).
            generation_config: as in `model.generate`.
            state: what an earlier call learned (`adapted.state`), to go on from.
            loss_mask: `[B, T]`, tokens that adaptations learn to predict; overrides `loss_on`.
            arguments: everything that `model.generate` takes, except what cannot be adapted
                (user caches, assisted decoding; beams with SCMoE or with intervals): typed refusals.

        Raises:
            ConfigError, UnsupportedCallError, ModelBusy, CoverageError: see the message. The model is
            left untouched, also after an interruption.
        """
        model = self._model
        if inputs is not None:
            if arguments.get("input_ids") is not None:
                raise ConfigError("generate got both inputs and input_ids. Pass one of them.")
            arguments["input_ids"] = inputs
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        with self._exclusive():
            plan = self._plan
            if self._paused or not plan.active:
                self._report = Report()  # what was learned before a pause is still there after it
                if self._traces is None:
                    return model.generate(**arguments)
                plan = Plan(plan.target, (), None)
            check_model_call(model)
            check_generate_call(plan, arguments)
            ids = check_ids(arguments.get("input_ids"))
            given = arguments.get("attention_mask")
            mask = check_prompt(model, ids, infer_mask(model, arguments, ids) if given is None else given)
            arguments["attention_mask"] = mask.long() if given is None else given
            targets = _targets(ids, mask, loss_mask)
            context = Context(ids, mask, targets, loss_mask is not None, _prompt_inputs(arguments))
            return self._generate(plan, context, arguments, state)

    def _generate(
        self, plan: Plan, context: Context, arguments: dict[str, Any], state: AdaptationState | None
    ) -> Any:
        model, traces = self._model, self._traces
        keys = sequence_keys(context.ids, context.mask)
        beams, copies = (option(model, arguments, n, 1) for n in ("num_beams", "num_return_sequences"))
        if traces is not None and beams > 1:
            raise UnsupportedCallError(
                f"num_beams={beams} cannot be traced: a beam's tokens were routed in the rows of other beams. "
                "Use num_beams=1, or trace a plain forward over the text that came out."
            )
        # what adaptations read is not traced: generate reads the prompt itself, under what was learned
        handed_over = traces is None and can_hand_over(plan, context, arguments)
        session = Session(plan, context.mask, keys, find_endings(model, arguments), handed_over)
        _restore(session, state)
        # generate repeats each prompt `max(beams, copies)` times: copies are a subset of the beams
        repeats = max(beams, copies)
        clock: dict[str, float] = {}
        started = perf_counter()
        meter = UsageMeter(session)
        with session.installed():
            with torch.no_grad(), edits_only(model):
                _prepare(session, context)
                clock["adapt"] = perf_counter() - started
                session.expand(repeats)
                if session.cache is not None:
                    arguments["past_key_values"] = session.cache
                session.hands_over = False  # from here on the cache is generate's
                meter.start()
                recorder = TraceRecorder(session) if traces is not None else None
                self._add_interval(session, meter, context, arguments, clock)
            begun = perf_counter()
            output = model.generate(**arguments)
            clock["generate"] = perf_counter() - begun - clock.get("readapt", 0.0)
        session.check_coverage()
        clock["total"] = perf_counter() - started
        sequences = output if isinstance(output, Tensor) else output.sequences
        rows = returned_rows(context.ids.shape[0], repeats, sequences.shape[0])
        if plan.active:
            self._state = _learned(session, rows)
            self._report = meter.report(context, sequences, rows, clock)
        if traces is not None and recorder is not None:
            traces += recorder.traces(context.ids, context.mask, sequences, rows)
        return output

    def _add_interval(
        self,
        session: Session,
        meter: UsageMeter,
        prompt: Context,
        arguments: dict[str, Any],
        clock: dict[str, float],
    ) -> None:
        """Let `generate` call back every `interval` tokens, through a criterion that never stops."""
        interval = self._plan.interval
        if interval is None:
            return
        length = prompt.ids.shape[1]
        prompt = prompt.repeat(session.sequences // prompt.ids.shape[0])
        experts = experts_implementation(self._model)

        def readapt(ids: Tensor) -> None:
            begun = perf_counter()
            active = ~session.ended(ids)
            if bool(active.any()):
                with torch.no_grad(), edits_only(self._model), meter.paused(), using_experts(self._model, experts):
                    text = prompt.continued(ids)
                    with session.unobserved():
                        changed = [run.adapt(text, active) for run in session.runs]
                    if any(changed) and session.cache is not None:
                        session.refill(text)
            clock["readapt"] = clock.get("readapt", 0.0) + perf_counter() - begun

        last = most_new_tokens(self._model, arguments)
        criteria = list(arguments.get("stopping_criteria") or [])
        arguments["stopping_criteria"] = [*criteria, EveryInterval(interval, length, last, readapt)]

    def __call__(
        self, input_ids: Tensor | None = None, *, state: AdaptationState | None = None, **arguments: Any
    ) -> Any:
        """A plain forward under the routing strategies. It never optimises; see `generate` for that.

        What an earlier call learned applies where it is passed as `state`, and only there: the same
        arguments always give the same output.

        Raises:
            UnsupportedCallError: a cache is passed in, whose entries had another routing.
        """
        if input_ids is not None:
            arguments["input_ids"] = input_ids
        model = self._model
        with self._exclusive():
            routing = () if self._paused else self._plan.routing
            if not routing and self._traces is None:
                return model(**arguments)
            check_model_call(model)
            cache = arguments.get("past_key_values")
            if cache is not None:
                raise UnsupportedCallError(
                    "A forward with past_key_values cannot be adapted: the cache was computed under another "
                    "routing. Pass the whole text, or use generate."
                )
            ids = check_ids(arguments.get("input_ids"))
            given = arguments.get("attention_mask")
            mask = check_inputs(model, ids, given if isinstance(given, Tensor) and given.dim() == 2 else None)
            session = Session(Plan(self._plan.target, routing, None), mask, sequence_keys(ids, mask))
            _restore(session, state)
            recorder = TraceRecorder(session) if self._traces is not None else None
            with session.installed():
                output = model(**arguments)
            session.check_coverage()
            if self._traces is not None and recorder is not None:
                self._traces += recorder.traces(ids, mask, ids, list(range(ids.shape[0])))
            return output

    forward = __call__  # the model's own would go past the strategies

    def score(
        self,
        input_ids: Tensor,
        choices: Sequence[Sequence[Continuation]],
        *,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> list[list[Likelihood]]:
        """How likely is each of several continuations? Adaptations read the text, once, and no continuation.

        Every text is then read with each of its continuations in plain forwards under what was learned. A strategy
        for the last prompt token acts on the last token of the text. SCMoE is scored without its mask.

        Args:
            input_ids: `[B, T]` token ids, padded on the left. attention_mask: `[B, T]`, real tokens; all by default.
            choices: `B` lists of at least one continuation. loss_mask: as in `generate`.

        Returns:
            `B` lists of log-likelihoods, in the order given.

        Raises:
            ConfigError, UnsupportedCallError, ModelBusy, CoverageError: see the message.
        """
        model = self._model
        if self._traces is not None:
            raise UnsupportedCallError("score is not traced: it reads each text several times. Trace plain calls.")
        with self._exclusive(), torch.no_grad():
            ids = check_ids(input_ids)
            mask = check_prompt(model, ids, attention_mask)
            context = Context(ids, mask, _targets(ids, mask, loss_mask), loss_mask is not None)
            if self._paused or not self._plan.active:
                bare = Session(Plan(self._plan.target, (), None), mask, sequence_keys(ids, mask))
                check_choices(bare, context, choices)
                self._report = Report()
                return read_choices(bare, context, choices)
            check_model_call(model)
            session = Session(self._plan, mask, sequence_keys(ids, mask))
            check_choices(session, context, choices)
            started, meter = perf_counter(), UsageMeter(session)
            with session.installed():
                with edits_only(model):
                    _prepare(session, context)
                adapted = perf_counter()
                meter.start()
                found = read_choices(session, context, choices)
            session.check_coverage()
            ended = perf_counter()
            clock = {"adapt": adapted - started, "score": ended - adapted, "total": ended - started}
            self._state = _learned(session, list(range(ids.shape[0])))
            self._report = meter.report(context, ids, list(range(ids.shape[0])), clock)
            return found

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Continuous batching mixes requests in one row, whose sequences taps cannot tell apart.

        Raises:
            UnsupportedCallError: always.
        """
        raise UnsupportedCallError(
            "Continuous batching cannot be adapted: requests share rows and pages. Use generate with a left-padded "
            "batch, or serve the model with vLLM."
        )

    continuous_batching_context_manager = init_continuous_batching = generate_batch

    # --- what came of it ------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What happened in the last `generate`, per sequence. Prints as a table."""
        return self._report

    @property
    def state(self) -> AdaptationState:
        """What the last `generate` learned; `generate(..., state=...)` goes on from it."""
        return self._state

    @property
    def sites(self) -> list[Site]:
        """The MoE layers."""
        return self._plan.target.sites

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """What is active, in the order of editing; a decoding strategy last."""
        last = (self._plan.decoding,) if self._plan.decoding is not None else ()
        return (*self._plan.routing, *last)

    # --- life -----------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[Any]:
        """Inside this block calls go straight to the model: no hook, the same bits."""
        self._paused += 1
        try:
            yield self
        finally:
            self._paused -= 1

    @contextmanager
    def tracing(self) -> Iterator[list[RoutingTrace]]:
        """Inside this block calls write down how they route: a trace for each returned sequence joins the list.

        `generate` traces the prompt and what it writes but for the last token, which no layer reads; a plain call
        traces its text. Calls inside `paused` trace the model's own routing, through taps that change no bit.
        Slower: prompts are read once more than by an adaptation alone.

        Raises:
            UnsupportedCallError: from `score`, and from beam search.
        """
        before, found = self._traces, list[RoutingTrace]()
        self._traces = found
        try:
            yield found
        finally:
            self._traces = before

    def close(self) -> None:
        """Give the model back. Idempotent; calls after it raise."""
        self.closed = True  # its place in the registry is free from now on, or as soon as a running call ends

    @property
    def running(self) -> bool:
        """Whether a call is inside the model now."""
        return self._lock.locked()

    def __enter__(self) -> AdaptiveModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also keeps copy and pickle away from a half-made instance
            raise AttributeError(name)
        return getattr(self._plan.target.model, name)

    def __repr__(self) -> str:
        names = " + ".join(s.name for s in self.strategies) or "nothing"
        return f"<AdaptiveModel {type(self._plan.target.model).__name__}: {names}>"

    # --- helpers --------------------------------------------------------------------------------------

    @property
    def _model(self) -> Any:
        if self.closed:
            raise UnsupportedCallError("This adapter is closed. Call ttr.adapt(model, ...) again.")
        return self._plan.target.model

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ModelBusy(
                "Another adapted call on this model is still running. Wait for it: sequences of one call go in "
                "one batch, not in several threads."
            )
        try:
            yield
        finally:
            self._lock.release()


def _prepare(session: Session, context: Context) -> None:
    """Let strategies learn from the prompts."""
    for run in session.runs:
        if overrides(run, "prepare"):  # it may change the routing that an earlier run read with
            session.cache = None
            run.prepare(context)
    if session.decoding is not None:  # under what the others learned
        session.decoding.prepare(context)


def _learned(session: Session, rows: list[int]) -> AdaptationState:
    """What the runs learned, for these rows of the session."""
    learned = {run.strategy.name: run.state() for run in session.runs}
    return AdaptationState(
        {name: {k: v[rows] for k, v in group.items()} for name, group in learned.items() if group},
        session.plan.target.fingerprint,
    )


def _restore(session: Session, state: AdaptationState | None) -> None:
    if state is not None:
        tensors = state.for_batch(session.sequences, session.plan.target.fingerprint)
        for run in session.runs:
            run.restore(tensors.get(run.strategy.name, {}))


def _targets(ids: Tensor, mask: Tensor, given: Tensor | None) -> Tensor:
    """`[B, T]` bool: tokens whose prediction counts; all real ones unless the caller gave a mask."""
    targets = mask.clone()
    if given is not None:
        if given.shape != ids.shape:
            raise ConfigError(
                f"loss_mask has shape {tuple(given.shape)} beside input_ids of shape {tuple(ids.shape)}."
            )
        targets &= given.to(mask.device, torch.bool)
    first = mask.long().argmax(1)  # nothing comes before it, so nothing predicts it
    targets[torch.arange(ids.shape[0], device=ids.device), first] = False
    return targets


_NOT_PROMPT = {"input_ids", "attention_mask", "position_ids", "past_key_values"}


def _prompt_inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors that go with the prompt into the model (pictures and the like)."""
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and k not in _NOT_PROMPT}
