"""How does a running server answer: as a streamed chat completion, with the strategies in each request?

What a server does not tell stays open: experts, roll-backs, milliseconds of an adaptation. It keeps nothing between
two requests, so every turn adapts from nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from ttrouting.cli.chat.answers import Answer, Request, rate
from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.interrupts import Leave
from ttrouting.cli.chat.prompts import PLAIN, STOP, messages, plain, visible
from ttrouting.server import Server, ServerError
from ttrouting.strategy import Strategy
from ttrouting.vllm import spec_json

ENDED = {"stop": "end", "length": "length"}


class RemoteEngine:
    """A server; attributes as in `Engine`.

    Raises:
        ServerError: it does not answer, or serves another model.
    """

    keeps_state = False

    def __init__(self, url: str, model: str) -> None:
        self._server = Server(url, model)
        self._extra: dict[str, Any] = {}
        self._templated = True
        self.name = self._server.served
        self.limit = self._server.context
        self.about = f"{self.name} at {self._server.url}"
        self.advice = "A server tells no experts and no roll-backs, and every turn adapts from nothing."

    def use(self, strategies: Sequence[Strategy], no_harm: bool) -> None:
        """Requests carry these strategies from now on; the server says whether it takes them when it is asked."""
        self._extra = {"vllm_xargs": {"ttrouting": spec_json(strategies, no_harm=no_harm)}} if strategies else {}

    def length(self, turns: Sequence[Turn]) -> int | None:
        """Not told by a server."""
        return None

    def close(self) -> None:
        """Let go of the connection."""
        self._server.close()

    def ask(self, request: Request) -> Answer:
        """Answer a message.

        Raises:
            KeyboardInterrupt: stopped before there was a text. ServerError: see the message.
        """
        if self._templated:
            try:
                return self._ask(request)
            except ServerError as error:
                if error.status != 400 or "chat template" not in str(error):
                    raise
                request.tell(PLAIN)
                self._templated = False
        return self._ask(request)

    def _ask(self, request: Request) -> Answer:
        stop = None if self._templated else STOP
        text, shown, begun = "", 0, perf_counter()
        first: float | None = None
        last, ended = begun, "end"
        usage: dict[str, Any] = {}
        try:
            for piece, reason, counted in self._events(request):
                usage = counted or usage
                ended = ENDED.get(reason, reason) if reason else ended
                if piece:
                    last = perf_counter()
                    first = first or last
                text += piece
                found = visible(text, stop, ended=False)
                if len(found) > shown:
                    request.show(found[shown:])
                    shown = len(found)
        except KeyboardInterrupt as pressed:
            if not text or isinstance(pressed, Leave):
                raise
            ended = "stopped"
        found = visible(text, stop, ended=True)
        if len(found) > shown:
            request.show(found[shown:])
        tokens = usage.get("completion_tokens")
        return Answer(
            text=found,
            pieces=tuple(re.findall(r"\s*\S+", found)),
            seconds=perf_counter() - begun,
            first_seconds=None if first is None else first - begun,
            tokens=tokens,
            prompt_tokens=usage.get("prompt_tokens"),
            per_second=rate(tokens, last - (first or last)),
            ended=ended,
        )

    def _events(self, request: Request) -> Iterator[tuple[str, str | None, dict[str, Any] | None]]:
        """Text, the reason of the end, and the counts, each where an event has it."""
        wanted = request.settings
        body: dict[str, Any] = {
            "model": self.name,
            "max_tokens": wanted.max_new_tokens,
            "temperature": 0.0 if wanted.greedy else 1.0 if wanted.temperature is None else wanted.temperature,
            "seed": wanted.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if wanted.top_p is None else {"top_p": wanted.top_p}),
            **({} if request.base else self._extra),
        }
        own: dict[str, Any]
        if self._templated:
            path, own = "chat/completions", {"messages": messages(request.turns, request.text)}
        else:
            path, own = "completions", {"prompt": plain(request.turns, request.text), "stop": [STOP]}
        for event in self._server.stream(path, {**body, **own}):
            choice = (event.get("choices") or [{}])[0]
            piece = (choice.get("delta") or {}).get("content") if self._templated else choice.get("text")
            yield piece or "", choice.get("finish_reason"), event.get("usage")
