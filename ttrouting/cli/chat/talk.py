"""A chat: what happens with a line that was typed, and what is carried from one turn to the next?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch

from ttrouting.cli.chat.answers import Answer, Engine, Request
from ttrouting.cli.chat.commands import run
from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.interrupts import Leave, Stop
from ttrouting.cli.chat.screen import Screen
from ttrouting.cli.chat.switches import CONTINUE, Settings, Switches
from ttrouting.errors import ConfigError, TTRoutingError, UnsupportedCallError
from ttrouting.state import AdaptationState

OUT_OF_MEMORY = (
    "The model ran out of memory on this conversation. Begin a shorter one (/clear), or turn something /off."
)


class Chat:
    """One conversation with one engine.

    Args:
        interruptible: Ctrl-C stops an answer and not the process.

    Attributes:
        turns: what was said. settings, switches: as they are now. answers: those of this session, in order.
        refused: the first error, None where all went well.
    """

    def __init__(
        self, engine: Engine, screen: Screen, settings: Settings, switches: Switches, interruptible: bool = False
    ) -> None:
        self.engine = engine
        self.screen = screen
        self.turns: list[Turn] = []
        self.answers: list[tuple[str, Answer]] = []
        self.refused: TTRoutingError | None = None
        self.settings = settings
        self.switches = Switches()
        self._interruptible = interruptible
        self._learned = AdaptationState()  # what the next turn goes on from
        self._learned_before = AdaptationState()  # what the last turn went on from
        self._regenerated = 0
        self.set(switches, settings)

    # --- lines ----------------------------------------------------------------------------------------

    def handle(self, line: str) -> None:
        """Run a command, or send a message. What goes wrong is told and remembered.

        Raises:
            Leave: the user wants to go. KeyboardInterrupt: the answer was stopped before it had a text.
        """
        try:
            line = line.strip()
            if line.startswith("/") and not line.startswith("//"):
                run(self, line)
            elif line:
                self.say(line[1:] if line.startswith("//") else line)
        except TTRoutingError as error:
            self.fail(error)
        except torch.OutOfMemoryError:
            self.fail(UnsupportedCallError(OUT_OF_MEMORY))

    def fail(self, error: TTRoutingError) -> None:
        """Tell what went wrong."""
        self.refused = self.refused or error
        self.screen.error(str(error))

    # --- turns ----------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Send a message and keep the turn."""
        self._regenerated = 0
        start = self._start(self._learned)
        answer = self._shown(self.turns, text, start, self.settings.seed)
        self._learned_before = start
        self._keep(text, answer)

    def regenerate(self) -> None:
        """Answer the last message again, from where it began.

        Raises:
            ConfigError: there is none.
        """
        last = self._last()
        self._regenerated += 1
        start = self._start(self._learned_before)
        answer = self._shown(self.turns[:-1], last.user, start, self.settings.seed + self._regenerated)
        self.turns.pop()
        self._keep(last.user, answer)
        if answer.text == last.answer and self.settings.greedy:
            self.screen.note("The same answer: greedy decoding has one only. /set temperature 0.7 samples.")

    def compare(self) -> tuple[Answer, Answer]:
        """The last message answered again, without strategies and with them; the conversation stays as it is.

        Raises:
            ConfigError: there is no message, or nothing is on. KeyboardInterrupt: one of the answers was stopped.
        """
        last = self._last()
        if not self.switches.on:
            raise ConfigError("Nothing is on, so there is nothing to compare. Turn a strategy on: /on rerouting.")
        found = []
        for base in (True, False):
            label = "answering without strategies" if base else f"answering with {', '.join(self.switches.names)}"
            state = self._start(self._learned_before)
            with self.screen.waiting(label):
                found.append(self._ask(self.turns[:-1], last.user, state, self.settings.seed, base, lambda _: None))
            if found[-1].ended == "stopped":
                raise KeyboardInterrupt
        return found[0], found[1]

    def clear(self, turns: list[Turn] | None = None) -> None:
        """Forget the conversation and what was learned in it; go on from other turns if they are given."""
        self.turns = turns or []
        self._learned = self._learned_before = AdaptationState()

    def set(self, switches: Switches, settings: Settings) -> None:
        """Other strategies or settings, if the engine takes them."""
        if settings.adaptation == CONTINUE and self.settings.adaptation != CONTINUE and not self.engine.keeps_state:
            raise ConfigError("A server keeps nothing between turns: adaptation stays fresh.")
        if (switches.on, settings.no_harm) != (self.switches.on, self.settings.no_harm):
            with self.screen.waiting("trying the strategies on the model"):
                self.engine.use(switches.on, settings.no_harm)
        gone = [name for name in self._learned.tensors if name not in switches.names]
        if gone:
            self._learned = _without(self._learned, gone)
            self.screen.note(f"What {', '.join(gone)} learned is forgotten.")
        self.switches, self.settings = switches, settings

    # --- helpers --------------------------------------------------------------------------------------

    def _last(self) -> Turn:
        if not self.turns:
            raise ConfigError("There is no turn yet. Ask something first.")
        return self.turns[-1]

    def _start(self, learned: AdaptationState) -> AdaptationState:
        """What a turn goes on from; nothing of strategies that are off by now."""
        if self.settings.adaptation != CONTINUE or not self.engine.keeps_state:
            return AdaptationState()
        return _without(learned, [name for name in learned.tensors if name not in self.switches.names])

    def _keep(self, text: str, answer: Answer) -> None:
        on = tuple(s.to_dict() for s in self.switches.on)
        self.turns.append(Turn(text, answer.text, answer.ended == "stopped", on))
        self.answers.append((text, answer))
        self._learned = answer.state or AdaptationState()

    def _shown(self, turns: list[Turn], text: str, state: AdaptationState, seed: int) -> Answer:
        """Ask, and show the answer as it comes."""
        writer = self.screen.writer()
        label = f"reading, with {', '.join(self.switches.names)}" if self.switches.on else "reading"
        with ExitStack() as waiting:
            waiting.enter_context(self.screen.waiting(label))

            def show(piece: str) -> None:
                waiting.close()
                if writer is not None:
                    writer.feed(piece)

            try:
                answer = self._ask(turns, text, state, seed, False, show)
            except KeyboardInterrupt as pressed:
                waiting.close()
                if not isinstance(pressed, Leave):
                    self.screen.note("Stopped before there was an answer: the conversation is as it was.")
                raise
            finally:
                waiting.close()
                if writer is not None:
                    writer.end()
        self.screen.answer(answer.text)
        if not answer.text:
            self.screen.note("(an empty answer)")
        self.screen.footer(answer)
        return answer

    def _ask(
        self,
        turns: list[Turn],
        text: str,
        state: AdaptationState,
        seed: int,
        base: bool,
        show: Callable[[str], None],
    ) -> Answer:
        stop = Stop()
        with stop.on_interrupt() if self._interruptible else nullcontext():
            return self.engine.ask(
                Request(
                    turns=turns,
                    text=text,
                    settings=replace(self.settings, seed=seed),
                    stop=stop,
                    show=show,
                    tell=self.screen.note,
                    state=state,
                    base=base,
                )
            )


def _without(state: AdaptationState, names: list[str]) -> AdaptationState:
    return replace(state, tensors={name: group for name, group in state.tensors.items() if name not in names})
