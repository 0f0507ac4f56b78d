"""How does a model in this process answer, token by token and so that it can be stopped?

Everything runs in the main thread: Ctrl-C reaches a reading of the prompt or an adaptation as an exception, after
which the library has taken everything back, and ends a text between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

import ttrouting as ttr
from ttrouting.cli.chat.answers import Answer, Request, rate
from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.interrupts import Stop
from ttrouting.cli.chat.prompts import PLAIN, Prompts, visible
from ttrouting.cli.chat.routing import RoutingChange, compare
from ttrouting.cli.generate import sampling
from ttrouting.cli.models import POCKET
from ttrouting.errors import ConfigError, UnsupportedCallError
from ttrouting.generation import find_endings
from ttrouting.spans import token_starts
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy

TRY = "It knows sums and the like, one question a line: 12+30, REVERSE 4 7 1, MAX 86 30 97."


class LocalEngine:
    """A transformers model under strategies; attributes as in `Engine`.

    Raises:
        NotMoEError, UnsupportedModelError: the model cannot be adapted.
    """

    keeps_state = True

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = Prompts(model, tokenizer)
        self._strategies: tuple[Strategy, ...] = ()
        self._no_harm = True
        self._adapted = ttr.adapt(model, (), tokenizer=tokenizer)
        self._last: tuple[list[int], Sequence[Strategy], AdaptationState] | None = None
        self.limit = self._prompts.limit
        sites = self._adapted.sites
        experts, chosen = _range([s.num_experts for s in sites]), _range([s.top_k for s in sites])
        self.about = f"{name}: {len(sites)} MoE layers, {experts} experts, {chosen} per token, on {model.device}"
        plain = "" if self._prompts.templated else PLAIN
        self.advice = f"{plain} {TRY}" if name == POCKET else plain

    def use(self, strategies: Sequence[Strategy], no_harm: bool) -> None:
        """Answer under these strategies from now on; where they are refused, under those from before."""
        self._adapted.close()
        try:
            self._adapt(strategies, no_harm)
        except BaseException:  # Ctrl-C too
            self._adapt(self._strategies, self._no_harm)
            raise

    def _adapt(self, strategies: Sequence[Strategy], no_harm: bool) -> None:
        self._adapted = ttr.adapt(self._model, strategies, no_harm=no_harm, tokenizer=self._tokenizer)
        self._strategies, self._no_harm = tuple(strategies), no_harm

    def length(self, turns: Sequence[Turn]) -> int | None:
        """Tokens of a conversation with an empty message after it."""
        return int(self._prompts.encoded(turns, "")["input_ids"].shape[1]) if turns else 0

    def close(self) -> None:
        """Give the model back."""
        self._adapted.close()

    # --- answering ------------------------------------------------------------------------------------

    def ask(self, request: Request) -> Answer:
        """Answer a message.

        Raises:
            KeyboardInterrupt: stopped before there was a text. TTRoutingError: see the message.
        """
        wanted = request.settings
        inputs, left_out = self._prompts.fitted(request.turns, request.text, wanted.max_new_tokens)
        length = int(inputs["input_ids"].shape[1])
        self._tell(request, left_out)
        room = wanted.max_new_tokens if self.limit is None else min(wanted.max_new_tokens, self.limit - length)
        streamer = _Streamer(self._tokenizer, request.show, self._prompts.stop, request.stop)
        arguments: dict[str, Any] = {
            **inputs,
            **sampling(wanted.temperature, wanted.top_p),
            "max_new_tokens": room,
            "streamer": streamer,
            "stopping_criteria": [_Asked(request.stop)],
        }
        if self._prompts.stop is not None:
            arguments |= {"stop_strings": [self._prompts.stop], "tokenizer": self._tokenizer}
        if self._model.generation_config.pad_token_id is None:  # generate would warn that it takes this one
            arguments["pad_token_id"] = self._tokenizer.pad_token_id
        torch.manual_seed(wanted.seed)
        adapted, begun = self._adapted, perf_counter()
        with adapted.paused() if request.base else nullcontext():
            ids = adapted.generate(**arguments, state=None if request.base else request.state)
        seconds = perf_counter() - begun
        new = ids[0, length:].tolist()
        return self._answer(request, new, room, streamer, seconds, length, ids[0].tolist())

    def _answer(
        self,
        request: Request,
        new: list[int],
        room: int,
        streamer: _Streamer,
        seconds: float,
        length: int,
        whole: list[int],
    ) -> Answer:
        adapted, report = self._adapted, self._adapted.report
        active = not request.base and bool(adapted.strategies)
        if not request.base:
            done = report.sequences[0].strategies if report.sequences else {}
            kept = [s for s in adapted.strategies if not _undone(s, done, adapted.state)]
            self._last = (whole, kept, adapted.state if active else AdaptationState())
        first = None if streamer.first is None else streamer.first - streamer.begun
        again = report.milliseconds.get("readapt", 0.0) / 1000
        on = {s.name for s in adapted.strategies}
        return Answer(
            text=visible(streamer.text, self._prompts.stop, ended=True),
            pieces=self._pieces(new),
            seconds=seconds,
            first_seconds=first,
            tokens=len(new),
            prompt_tokens=length,
            per_second=rate(len(new), streamer.last - (streamer.first or 0.0) - again),
            ended=self._ended(request, new, room),
            report=report,
            experts=report.sequences[0].experts_per_token if report.sequences else self._own_experts(),
            state=adapted.state if active else None,
            idle=() if request.base else tuple(s.name for s in self._strategies if s.name not in on),
        )

    def _ended(self, request: Request, new: list[int], room: int) -> str:
        if request.stop.asked:
            return "stopped"
        ends = find_endings(self._model, {}).eos
        if len(new) < room or (new and new[-1] in ends):
            return "end"
        return "length" if room == request.settings.max_new_tokens else "context"

    def _own_experts(self) -> float:
        sites = self._adapted.sites
        return sum(s.top_k for s in sites) / len(sites)

    def _pieces(self, new: list[int]) -> tuple[str, ...]:
        """The tokens of an answer as text, without special ones and the white space around it."""
        special = set(self._tokenizer.all_special_ids)
        if not (kept_ids := [i for i in new if i not in special]):
            return ()
        text, starts = token_starts(kept_ids, self._tokenizer)
        kept = visible(text, self._prompts.stop, ended=True)
        low = text.find(kept)
        high = low + len(kept)
        pieces = [text[max(a, low) : min(b, high)] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        return tuple(piece for piece in pieces if piece)

    def _tell(self, request: Request, left_out: int) -> None:
        """Whatever the model does not read of what was written."""
        if left_out:
            request.tell(
                f"{left_out} of {len(request.turns)} earlier turns no longer fit into the context of {self.limit} "
                "tokens: the model does not read the oldest ones. /clear starts anew."
            )
        if unknown := self._prompts.unreadable(request.text):
            request.tell(
                f"This model's tokenizer has no token for {' '.join(unknown)}: it reads a placeholder there."
            )

    # --- looking ----------------------------------------------------------------------------------------

    def routing(self) -> RoutingChange:
        """How the last text was routed under the strategies that answered, beside the model's own routing.

        Raises:
            UnsupportedCallError: there is no answer yet.
        """
        if self._last is None:
            raise UnsupportedCallError("There is no answer yet. Ask something first, then /routing.")
        ids, strategies, state = self._last
        if not any(isinstance(s, ttr.RoutingStrategy) for s in strategies):
            names = ", ".join(s.name for s in strategies)
            why = f"{names} contrasts two routings and changes neither" if names else "no strategy was on"
            raise ConfigError(
                f"The last answer was routed by the model itself: {why}. Try /on rerouting, then /regen."
            )
        return compare(self._model, self._adapted.sites, self._tokenizer, ids, strategies, state)


class _Asked(StoppingCriteria):
    """Ends a text when somebody asked for it."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stop.asked, dtype=torch.bool, device=input_ids.device)


class _Streamer(TextStreamer):
    """Shows words as they are finished and keeps the time.

    Attributes:
        begun, first, last: when the call began, when its first and its last token came. text: all that was written.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None], end: str | None, stop: Stop) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._end, self._stop = show, end, stop
        self._shown = 0
        self.text = ""
        self.begun = self.last = perf_counter()
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """Token ids; the prompt comes first."""
        if not self.next_tokens_are_prompt:
            self.last = perf_counter()
            if self.first is None:
                self.first = self.last
                self._stop.heeded = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that later tokens do not change."""
        self.text += text
        found = visible(self.text, self._end, stream_end)
        if len(found) > self._shown:
            self._show(found[self._shown :])
            self._shown = len(found)


def _undone(strategy: Strategy, done: Mapping[str, Mapping[str, Any]], state: AdaptationState) -> bool:
    """Whether a strategy was rolled back without a state that says so by itself."""
    outcome = str(done.get(strategy.name, {}).get("outcome", ""))
    return outcome.startswith("rolled back") and strategy.name not in state.tensors


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
