"""Which requests of an engine are adapted, which slots do they have, and what proves that it was done?

Knows nothing of vLLM's runners: `runner_v1` and `runner_v2` tell it what is scheduled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttrouting.vllm.attach import Attached
from ttrouting.vllm.contrasting import keep
from ttrouting.vllm.neighbours import look_up
from ttrouting.vllm.recognising import read_again
from ttrouting.vllm.routing import Parts
from ttrouting.vllm.settings import KEY
from ttrouting.vllm.slots import WATCHED
from ttrouting.vllm.spec import Wanted, parse

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
            TaskDelta compares, see `recognising.compared`. before: `[V]` log-probabilities of its next token under
            its base routing, once its task is recognised.
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
        asks = self.wanted.c3po is not None or self.wanted.task_delta is not None
        return self.judged is not None or (asks and not self.read)


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
                if held.reading:
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
        if held.learned is not None or held.override is not None:
            self._write(held, held.slot)

    def _write(self, held: Held, slot: int) -> None:
        """Put into a slot what was learned for its request."""
        self.slots.set_delta(slot, held.wanted.delta, held.learned)
        if held.override is not None:
            self.slots.set_override(slot, held.override, held.first)

    def read_prompts(self, rows: Mapping[str, int], hidden: Tensor, logits: Tensor) -> list[int]:
        """After a forward: rows whose sample must wait, because C3PO or TaskDelta have their prompt read once more.

        What SCMoE is tried on is kept.

        Args:
            rows: row of each request in the batch. hidden: `[tokens, D]` last hidden states. logits: `[rows, V]`.
        """
        waiting = []
        for request_id, row in rows.items():
            held = self.requests.get(request_id)
            if held is None or not held.reading or held.rows[1] <= 0:
                continue
            begin, count, _ = held.rows
            own, again = hidden[begin : begin + count], False
            if held.judged is not None:
                keep(held, held.judged, own)
            elif held.wanted.c3po is not None:
                again = look_up(held, own.float(), self.slots.seen, self.attached.layers)
            else:
                again = read_again(held, own.float(), logits[row])
            if again and held.slot is not None:
                self._write(held, held.slot)
                waiting.append(row)
        return waiting

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
