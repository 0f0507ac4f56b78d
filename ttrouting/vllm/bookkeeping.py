"""Which requests of an engine are adapted, which slots do they have, and what proves that it was done?

Knows nothing of vLLM's runners: `runner_v1` and `runner_v2` tell it what is scheduled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttrouting.objective import divergence
from ttrouting.strategies._task_votes import verdict
from ttrouting.vllm.attach import Attached
from ttrouting.vllm.neighbours import override_logits
from ttrouting.vllm.routing import Parts
from ttrouting.vllm.settings import KEY
from ttrouting.vllm.slots import WATCHED
from ttrouting.vllm.spec import Wanted, parse
from ttrouting.vllm.voting import voted

KEEP_REPORTS = 1000
KEEP_PARSED = 64


@dataclass(eq=False)
class Held:
    """One adapted request on a worker, from its first step to its end; a preempted one has no slot.

    Attributes:
        wanted: its routing. prompt: tokens of its prompt. partner: of SCMoE, the request of the other stream.
        weak: whether this is the weak stream. learned: `[L, E]`, a delta that was optimised for it.
        override: `[L, E]` router logits for its last prompt token, once they are known; `first` lowest such layer.
        read: whether C3PO or TaskDelta are done with its prompt. total: `[D]`, sum of the hidden states that are
            compared with references; with C3PO of all prompt tokens but the last. rows: of this forward,
            `(first token, how many are of the prompt, position of the first)`.
            watched: column of `Slots.seen` in which its last prompt token stands. compared: prompt tokens that
            TaskDelta compares, see `voting.compared`. before: `[V]` log-probabilities of its next token under its
            base routing, once neighbours have voted for another.
        judged: positions `[P]` of the prompt, rising, at whose tokens SCMoE's contrast is tried; None once it was, or
            where it is not. states: `[P, D]` hidden states that predict them. on: whether the pair is contrasted.
        steps: sampling steps. alone: steps that were put off because the other stream was not there.
    """

    wanted: Wanted
    prompt: int
    partner: str | None = None
    weak: bool = False
    learned: Tensor | None = None
    slot: int | None = None
    override: Tensor | None = None
    first: int = 0
    tokens: int = 0
    read: bool = False
    total: Tensor | None = None
    rows: tuple[int, int, int] = (0, 0, 0)
    watched: int | None = None
    compared: tuple[int, int] = (0, 0)
    before: Tensor | None = None
    judged: list[int] | None = None
    states: Tensor | None = None
    on: bool = True
    steps: int = 0
    alone: int = 0
    limited: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def reading(self) -> bool:
        """Whether what its prompt is like decides how it will be routed, and that is not decided yet."""
        return not self.read and (self.wanted.c3po is not None or self.wanted.task_delta is not None)


class Bookkeeping:
    """All adapted requests of one worker."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.slots, self.taps = attached.slots, attached.taps
        self.requests: dict[str, Held] = {}
        self.reports: deque[dict[str, Any]] = deque(maxlen=KEEP_REPORTS)
        self.totals = {"requests": 0, "tokens": 0, "steps": 0, "put_off": 0}
        self._parsed: dict[str, Wanted] = {}  # by digest
        self._live: list[int] = []
        self._proven = False

    # --- life of a request --------------------------------------------------------------------------

    def add(self, request_id: str, params: Any, prompt: int) -> None:
        """A request was scheduled for the first time, or (with the V2 runner) again after a preemption."""
        if request_id in self.requests:
            return
        extra = getattr(params, "extra_args", None)
        if not extra or KEY not in extra:
            return
        data = extra[KEY]
        wanted = self._parsed.get(data["digest"])
        if wanted is None:
            wanted = parse(data["spec"], self.attached.settings, self.attached.facts)
            if len(self._parsed) >= KEEP_PARSED:
                self._parsed.clear()
            self._parsed[data["digest"]] = wanted
        learned = data.get("learned")
        self.requests[request_id] = Held(
            wanted,
            prompt,
            partner=data.get("partner"),
            weak=data.get("weak", False),
            learned=None if learned is None else torch.as_tensor(learned, dtype=torch.float32),
            compared=tuple(data.get("compared", (0, 0))),
            judged=data.get("judged"),
            facts=dict(data.get("facts", {})),
        )
        self.totals["requests"] += 1

    def release(self, request_id: str) -> None:
        """Give a request's slot back; it may run on later (preemption)."""
        held = self.requests.get(request_id)
        if held is None or held.slot is None:
            return
        self.slots.check([held.slot])
        held.tokens += self.slots.expected[held.slot]
        kept = self.slots.kept[:, held.slot]
        if held.wanted.dynamic_k is not None or held.weak:
            held.facts["pairs"] = held.facts.get("pairs", 0) + int(kept.sum())
        self.slots.give_back(held.slot)
        held.slot = held.watched = held.total = None  # a preempted prompt is read again from its start

    def drop(self, request_id: str) -> None:
        """A request has ended, however that came about."""
        self.release(request_id)
        held = self.requests.pop(request_id, None)
        if held is None:
            return
        self.totals["tokens"] += held.tokens
        self.totals["steps"] += held.steps
        self.totals["put_off"] += held.alone
        facts = dict(held.facts)
        if "pairs" in facts:
            facts["experts_per_token"] = facts.pop("pairs") / max(1, held.tokens) / len(self.attached.layers)
        self.reports.append(
            {"request": request_id, "tokens": held.tokens, "layers": len(self.attached.layers)}
            | ({"steps": held.steps, "put_off": held.alone, "limited_steps": held.limited} if held.partner else {})
            | facts
        )

    # --- a forward ----------------------------------------------------------------------------------

    def place(self, request_ids: Sequence[str], scheduled: Sequence[int], computed: Sequence[int]) -> None:
        """Before a forward: which tokens are whose.

        Args:
            request_ids: in the order of the batch. scheduled: tokens of each. computed: tokens in its cache.
        """
        spans: list[tuple[int, int, int]] = []
        overrides: list[int] = []
        watched: list[int] = []
        now, begin = Parts(), 0
        for request_id, count, before in zip(request_ids, scheduled, computed, strict=False):
            held = self.requests.get(request_id)
            if held is not None:
                if held.slot is None:
                    self._fill(held)
                spans.append((begin, begin + int(count), held.slot or 0))
                wanted = held.wanted
                now.delta |= wanted.delta is not None or held.learned is not None
                now.mask |= wanted.mask is not None
                now.dynamic_k |= wanted.dynamic_k is not None and not held.weak
                now.scmoe |= held.weak
                last = held.prompt - 1 - int(before)
                if held.reading or held.judged is not None:
                    held.rows = (begin, min(int(count), held.prompt - int(before)), int(before))
                if wanted.c3po is not None and not held.read:
                    held.watched = None
                    if 0 <= last < count and len(watched) < WATCHED:
                        held.watched = len(watched)
                        watched.append(begin + last)
                    now.c3po = True
                if held.override is not None and 0 <= last < count:
                    overrides.append(begin + last)
                    now.c3po = True
            begin += int(count)
        self.slots.place(spans, overrides, watched)
        self._live = sorted({slot for _, _, slot in spans})
        self.taps.now, self.taps.live = now, bool(spans)

    def _fill(self, held: Held) -> None:
        held.slot = self.slots.take(held.wanted, held.weak)
        if held.learned is not None:
            self.slots.set_delta(held.slot, held.wanted.delta, held.learned)
        if held.override is not None:
            self.slots.set_override(held.slot, held.override, held.first)

    def read_prompts(self, rows: Mapping[str, int], hidden: Tensor, logits: Tensor) -> list[int]:
        """After a forward: rows whose sample must wait, because C3PO or TaskDelta have their prompt read once more.

        What SCMoE is tried on is kept.

        Args:
            rows: row of each request in the batch. hidden: `[tokens, D]` last hidden states. logits: `[rows, V]`.
        """
        waiting = []
        for request_id, row in rows.items():
            held = self.requests.get(request_id)
            if held is None or held.rows[1] <= 0 or not (held.reading or held.judged is not None):
                continue
            begin, count, _ = held.rows
            if held.judged is not None:
                self._keep(held, held.judged, hidden[begin : begin + count])
                continue
            own = hidden[begin : begin + count].float()  # [n, D]
            again = self._ask(held, own) if held.wanted.c3po is not None else self._vote(held, own, logits[row])
            if again:
                waiting.append(row)
        return waiting

    def _keep(self, held: Held, judged: list[int], hidden: Tensor) -> None:
        """Keep the hidden states `[n, D]` that predict judged tokens."""
        _, count, before = held.rows
        if held.states is None:
            held.states = hidden.new_zeros(len(judged), hidden.shape[1])
        first, end = bisect_left(judged, before + 1), bisect_left(judged, before + count + 1)
        if first < end:
            predecessors = torch.tensor(judged[first:end], device=hidden.device) - 1 - before
            held.states[first:end] = hidden[predecessors]

    def _ask(self, held: Held, hidden: Tensor) -> bool:
        """C3PO: the last prompt token is read again with the logits that its neighbours suggest."""
        _, count, before = held.rows
        ends = before + count == held.prompt
        body = hidden[: count - ends].sum(0)  # [D]
        held.total = body if held.total is None else held.total + body
        if not ends:
            return False
        if held.watched is None:
            return True
        pooled = (held.total + hidden[-1]) / held.prompt
        seen = self.slots.seen[:, held.watched]
        held.override, held.facts = override_logits(held.wanted.c3po, self.attached.layers, seen, pooled)
        held.read, held.first = True, held.wanted.c3po.first_layer(len(self.attached.layers))
        if held.override is None or held.slot is None:
            return False
        self.slots.set_override(held.slot, held.override, held.first)
        return True

    def _vote(self, held: Held, hidden: Tensor, logits: Tensor) -> bool:
        """TaskDelta: the prompt is read again under the delta that its neighbours vote for, and a third time without
        it if that is not accepted."""
        _, count, before = held.rows
        leading, start = held.compared
        if held.before is None:
            chosen = hidden[: max(0, leading - before)].sum(0) + hidden[max(0, start - before) :].sum(0)  # [D]
            held.total = chosen if held.total is None else held.total + chosen
        if before + count < held.prompt:
            return False
        options, no_harm, again = held.wanted.task_delta, held.wanted.no_harm, False
        log_p = logits.float().log_softmax(-1)  # [V]
        if held.before is not None:
            kl = float(divergence(log_p, held.before))
            outcome = verdict(options, kl, no_harm)
            held.facts = {"outcome": outcome, **held.facts, "kl": kl}
            again, held.read, held.before = outcome != "accepted", True, None
            held.learned = None if again else held.learned
        elif held.total is not None:
            held.learned, held.facts = voted(options, held.total / (leading + held.prompt - start), no_harm)
            again = held.learned is not None
            held.read, held.before = not again, log_p if again else None
        if again and held.slot is not None:
            self.slots.set_delta(held.slot, held.wanted.delta, held.learned)
        return again

    def after_forward(self) -> None:
        """Prove that the forward did what it should; on accelerators the first one, and each request at its end."""
        if self._live and (self.slots.device.type == "cpu" or not self._proven):
            self.slots.check(self._live)
            self._proven = True
        self.taps.live = False

    def report(self) -> dict[str, Any]:
        """What was done so far, as plain values."""
        return {
            "slots": self.slots.size - 1,
            "free_slots": self.slots.free,
            "running": len(self.requests),
            "totals": dict(self.totals),
            "finished": list(self.reports),
        }
