"""Which one delta on router logits, shared by many texts, makes their known answers likeliest?

    fit = fit_shared_delta(model, tokenizer, [("Q: 1 2 3\\nA:", " 3 2 1\\n"), ...])
    ttr.StaticRouting(delta=fit.delta), fit.held.before.loss, fit.held.after.loss

Pairs fall into three parts: gradients come from `fit`, the step is chosen by `stop`, and `held` is seen by neither,
so that its losses may be compared with a test. The best of many steps looks better than it is where it was chosen.

Legend: `B` pairs of one forward, `T` tokens, `D` hidden size, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.context import Context
from ttrouting.errors import ConfigError, UnsupportedModelError
from ttrouting.generation import check_model_call
from ttrouting.gradients import check_gradients, edits_only
from ttrouting.head import CHUNK, check_head
from ttrouting.layers import LayerRule
from ttrouting.objective import losses_of, mean_loss
from ttrouting.pathways import answered_context, encode, home
from ttrouting.plan import Plan
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site, find_sites, text_config
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range
from ttrouting.target import Target

NAME = "shared_fit"
CHECK_EVERY = 5  # steps between two looks at the loss of `stop`
PATIENCE = 4  # looks without a lower loss, after which nothing is tried any more
STOP_SHARE = 0.2  # of the pairs that are not held out
MIN_PAIRS = 8


@dataclass(frozen=True)
class Answered:
    """How pairs are answered under one routing.

    Attributes:
        losses: of each pair, mean over its answer's tokens, in nats.
        right: of each pair, whether its answer's tokens are all likeliest: then greedy decoding writes it.
    """

    losses: list[float]
    right: list[bool]

    @property
    def loss(self) -> float:
        """Mean over pairs."""
        return fsum(self.losses) / len(self.losses)

    @property
    def share_right(self) -> float:
        """In 0..1."""
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Part:
    """Some of the pairs, under the model's own routing and under the delta.

    Attributes:
        numbers: which pairs, counted from 0; the lists of `before` and `after` are in this order.
    """

    numbers: list[int]
    before: Answered
    after: Answered


@dataclass(frozen=True, eq=False)
class SharedFit:
    """A delta and what it does.

    Attributes:
        delta: `[L, E]` on the CPU, to be added to router logits; 0 where no step was better than none.
        step: after which it was taken; 0 is the model's own routing.
        curve: loss of the minibatch before each step. checks: `(step, loss of stop)`, the first at step 0.
        fit, stop, held: pairs of the gradients, of the choice of the step, and of neither.
        first: index of the lowest layer that was fitted.
    """

    delta: Tensor
    step: int
    curve: list[float]
    checks: list[tuple[int, float]]
    fit: Part
    stop: Part
    held: Part
    first: int


def fit_shared_delta(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    steps: int = 60,
    lr: float = 0.05,
    layers: str = "all",
    batch_size: int = 32,
    held_out: float = 0.25,
    seed: int = 0,
    enough: float | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> SharedFit:
    """Minimise the mean cross-entropy of answers over one delta `[L, E]`, by Adam on minibatches.

    The loss is the mean over pairs of each answer's mean token loss; prompt tokens do not count. The model's
    parameters are left alone.

    Args:
        model, tokenizer: a supported model in eval mode that is not adapted.
        pairs: `(prompt, answer)`, at least 8; the answer exactly as it goes on from the prompt.
        steps, lr: at most so many steps of this rate; fewer where the loss of `stop` has long not fallen.
        layers: `all` or `last:N`. batch_size: pairs in one forward. held_out: share of the pairs in `held`.
        seed: of the parts and of the order of pairs.
        enough: share of right answers in `held` from which on nothing is fitted; None: always fit.
        progress: called after each step with its number and its loss.

    Raises:
        ConfigError: an option out of range, too few pairs, an answer without a token, a pair that is too long.
        NotMoEError, UnsupportedModelError, UnsupportedCallError: as in `ttr.adapt` with Rerouting.
    """
    in_range(NAME, "steps", steps, 0, 100_000, whole=True)
    in_range(NAME, "lr", lr, 0, 100)
    in_range(NAME, "batch_size", batch_size, 1, 100_000, whole=True)
    in_range(NAME, "held_out", held_out, 0, 0.9, open_low=True)
    in_range(NAME, "seed", seed, 0, whole=True)
    rule = shared_rule(layers)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{NAME} needs a loaded model that is not adapted, got {model!r}.")
    check_model_call(model)
    target = Target(model, find_sites(model), tokenizer)
    if not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedModelError(
            f"{NAME} needs next-token logits, and {type(model).__name__} has no causal language-model head. Load the "
            "...ForCausalLM class."
        )
    texts = _Texts(target, pairs, batch_size)
    check_gradients(NAME, target)
    check_head(target)
    fit, stop, held = split_pairs(len(pairs), held_out, seed)
    first = rule.lowest(len(target.sites))
    one = torch.ones(1, 1, dtype=torch.bool, device=home(model))  # sequence: all rows of a forward share its delta
    session = Session(Plan(target, (), None), one, one[0].long())
    run = _SharedRun(session, first)
    session.runs.append(run)
    session.enable()
    reader = _Reader(session, run, texts)
    with session.installed(), torch.no_grad(), edits_only(model):
        start = {name: reader.judge(part) for name, part in (("stop", stop), ("held", held))}
        if not isfinite(start["stop"].loss + start["held"].loss):
            raise ConfigError(
                f"{NAME}: the model's own loss on these pairs is no number. Load it in another dtype: float32."
            )
        if enough is not None and start["held"].share_right >= enough:
            steps = 0
        curve, checks, best = reader.descend(fit, stop, start["stop"].loss, (steps, lr, batch_size, seed), progress)
        run.delta = run.delta.new_zeros(run.delta.shape)
        start["fit"] = reader.judge(fit)
        step, delta = best
        run.delta = delta
        parts = {
            name: Part(part, start[name], reader.judge(part) if step else start[name])
            for name, part in (("fit", fit), ("stop", stop), ("held", held))
        }
    session.check_coverage()
    return SharedFit(delta[0].cpu(), step, curve, checks, **parts, first=first)


def shared_rule(layers: str) -> LayerRule:
    """The layers of a shared delta.

    Raises:
        ConfigError: a rule that looks at a sequence, of which there are many here.
    """
    rule = LayerRule.parse(layers)
    if rule.kind not in ("last", "all"):
        raise ConfigError(f"{NAME}.layers must be 'last:N' or 'all', got {layers!r}.")
    return rule


def split_pairs(count: int, held_out: float, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the pairs to fit, to stop by, and to hold out; each is sorted, and none is empty."""
    if count < MIN_PAIRS:
        raise ConfigError(f"{NAME} needs at least {MIN_PAIRS} pairs, got {count}. Give more examples.")
    order = list(range(count))
    random.Random(f"{seed}|parts").shuffle(order)
    held = min(max(1, round(held_out * count)), count - 2)
    stop = max(1, round(STOP_SHARE * (count - held)))
    return sorted(order[held + stop :]), sorted(order[held : held + stop]), sorted(order[:held])


class _SharedRun(RoutingRun):
    """One delta `[1, L, E]` for every row of every forward."""

    def __init__(self, session: Session, first: int) -> None:
        super().__init__(RoutingStrategy(), session)
        sites = session.sites
        dtype = torch.float64 if sites[0].edit_dtype == torch.float64 else torch.float32
        widest = max(s.num_experts for s in sites)
        self.delta = torch.zeros(1, len(sites), widest, dtype=dtype, device=session.keys.device)
        self.first = first

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        """`z + delta`; nothing is kept for a gradient below the first layer."""
        if site.index < self.first:
            return logits
        return logits + rows.per_token(self.delta[:, site.index, : site.num_experts].to(logits), logits.device)


class _Texts:
    """Pairs as token ids."""

    def __init__(self, target: Target, pairs: Sequence[tuple[str, str]], batch_size: int) -> None:
        prompts, answers = [p for p, _ in pairs], [a for _, a in pairs]
        self.prompts, self.answers = encode(target.tokenizer, prompts, answers)
        self.batch_size = batch_size
        self._pad = target.tokenizer.pad_token_id or 0
        self.length = [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if not prompt or not answer:
                raise ConfigError(
                    f"{NAME}: pair {number} has no token in its prompt or in its answer: {pairs[number]}."
                )
        limit = getattr(text_config(target.model.config), "max_position_embeddings", None)
        longest = max(range(len(pairs)), key=self.length.__getitem__, default=0)
        if limit is not None and pairs and self.length[longest] > limit:
            raise ConfigError(
                f"{NAME}: pair {longest} has {self.length[longest]} tokens, the model's context {limit}. Leave it "
                "out, or use fewer solved examples."
            )

    def context(self, numbers: Sequence[int], device: torch.device) -> Context:
        """These pairs as one batch whose targets are the answers."""
        prompts, answers = [self.prompts[i] for i in numbers], [self.answers[i] for i in numbers]
        return answered_context(prompts, answers, self._pad, device)[0]


class _Reader:
    """Forwards over pairs under the run's delta."""

    def __init__(self, session: Session, run: _SharedRun, texts: _Texts) -> None:
        self._session, self._run, self._texts = session, run, texts

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """Mean over these pairs of the mean loss of an answer's tokens, a scalar."""
        context = self._texts.context(numbers, self._run.delta.device)
        hidden, head = self._session.read_body(context)
        return mean_loss(losses_of(self._session, context, hidden, head), context.targets).mean()

    def judge(self, numbers: Sequence[int]) -> Answered:
        """Losses and right answers of these pairs, in their order."""
        losses: dict[int, float] = {}
        right: dict[int, bool] = {}
        ordered, size = sorted(numbers, key=self._texts.length.__getitem__), self._texts.batch_size
        for i in range(0, len(ordered), size):
            batch = ordered[i : i + size]
            context = self._texts.context(batch, self._run.delta.device)
            hidden, head = self._session.read_body(context)
            each = mean_loss(losses_of(self._session, context, hidden, head), context.targets)
            losses |= zip(batch, each.tolist(), strict=True)
            hits = torch.ones_like(context.targets[:, 0])
            columns = context.targets.any(0).nonzero().flatten()
            for some in columns.split(max(1, CHUNK // len(batch))):
                likeliest = head(hidden[:, (some - 1).to(hidden.device)]).argmax(-1).to(context.ids.device)
                hits &= ((likeliest == context.ids[:, some]) | ~context.targets[:, some]).all(1)
            right |= zip(batch, hits.tolist(), strict=True)
        return Answered([losses[i] for i in numbers], [right[i] for i in numbers])

    def descend(
        self,
        fit: list[int],
        stop: list[int],
        start: float,
        options: tuple[int, float, int, int],
        progress: Callable[[int, float], None] | None,
    ) -> tuple[list[float], list[tuple[int, float]], tuple[int, Tensor]]:
        """Adam from 0; the step at which `stop` has the lowest loss, and the delta `[1, L, E]` there."""
        steps, lr, batch_size, seed = options
        run = self._run
        variable = run.delta.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([variable], lr=lr)
        best, lowest, since = (0, run.delta.clone()), start, 0
        curve, checks = [], [(0, start)]
        minibatches = _minibatches(fit, batch_size, seed)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                run.delta = variable
                loss = self.loss(next(minibatches))
                (variable.grad,) = torch.autograd.grad(loss, variable)
            if not (isfinite(float(loss)) and bool(torch.isfinite(variable.grad).all())):
                break  # what came before is kept
            optimiser.step()
            curve.append(float(loss))
            if progress is not None:
                progress(step, curve[-1])
            if step % CHECK_EVERY == 0 or step == steps:
                run.delta = variable.detach()
                now = self.judge(stop).loss
                checks.append((step, now))
                if now < lowest:
                    best, lowest, since = (step, run.delta.clone()), now, 0
                else:
                    since += 1
                if since == PATIENCE:
                    break
        return curve, checks, best


def _minibatches(numbers: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """Without end: the pairs in another order each time round, what is left over at its end left out."""
    draw = random.Random(f"{seed}|order")
    while True:
        order = list(numbers)
        draw.shuffle(order)
        size = min(size, len(order))
        for i in range(0, len(order) - size + 1, size):
            yield order[i : i + size]
