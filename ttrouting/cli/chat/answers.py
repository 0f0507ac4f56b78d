"""What is asked of a model or a server, and what comes back, with what it cost?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.interrupts import Stop
from ttrouting.cli.chat.switches import Settings
from ttrouting.report import Report
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy


@dataclass(frozen=True)
class Request:
    """One message.

    Attributes:
        turns: what was said before. text: the message. settings: sampling; its seed is the one to use.
        state: what earlier turns learned, None to begin from nothing. base: without any strategy.
        stop: whether to end early. show: gets the answer, piece by piece. tell: gets what else has to be said.
    """

    turns: Sequence[Turn]
    text: str
    settings: Settings
    stop: Stop
    show: Callable[[str], None]
    tell: Callable[[str], None]
    state: AdaptationState | None = None
    base: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the answer. pieces: the same as tokens; as words where a server tells no tokens.
        seconds: in all. first_seconds: until the first token, None without one.
        tokens, prompt_tokens: counts, None where a server does not tell.
        per_second: tokens after the first one by the time they took, adaptations left out.
        ended: `end`, `stopped` (by hand), `length` (max_new_tokens) or `context` (the model's is full).
        report: of the adapted call; empty without strategies and from a server.
        experts: mean number that ran for a token, None where a server does not tell.
        state: what was learned. idle: strategies that are on and change nothing with their options.
    """

    text: str
    pieces: tuple[str, ...]
    seconds: float
    first_seconds: float | None
    tokens: int | None
    prompt_tokens: int | None
    per_second: float | None
    ended: str
    report: Report = field(default_factory=Report)
    experts: float | None = None
    state: AdaptationState | None = None
    idle: tuple[str, ...] = ()

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What each strategy did, by name."""
        return self.report.sequences[0].strategies if self.report.sequences else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "answer": self.text,
            "ended": self.ended,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds": self.seconds,
            "first_token_seconds": self.first_seconds,
            "tokens_per_second": self.per_second,
            "experts_per_token": self.experts,
            "report": self.report.to_dict(),
        }


class Engine(Protocol):
    """Who answers: a model in this process, or a server.

    Attributes:
        name: of the model. about: one line on it. advice: what a newcomer has to know about it, may be empty.
        limit: tokens of its context, None if unknown. keeps_state: whether a turn can go on from what was learned.
    """

    name: str
    about: str
    advice: str
    limit: int | None
    keeps_state: bool

    def use(self, strategies: Sequence[Strategy], no_harm: bool) -> None:
        """Answer under these strategies from now on; where they are refused, under those from before."""

    def ask(self, request: Request) -> Answer:
        """Answer a message."""

    def length(self, turns: Sequence[Turn]) -> int | None:
        """Tokens of a conversation, None where a server does not tell."""

    def close(self) -> None:
        """Give back what is held."""


def rate(tokens: int | None, seconds: float) -> float | None:
    """Tokens per second after the first one."""
    return (tokens - 1) / seconds if tokens is not None and tokens > 1 and seconds > 0 else None
