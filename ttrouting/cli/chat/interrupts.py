"""What does Ctrl-C do while an answer is being written? It stops the answer; a second one leaves the chat."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Leave(KeyboardInterrupt):
    """The chat is over: /exit, or Ctrl-C pressed twice. As an interruption it passes everything on its way."""


class Stop:
    """Whether the answer that is being written is to end.

    Attributes:
        asked: Ctrl-C was pressed. heeded: somebody looks at `asked` after each token, so that an answer ends with
            its report; before that (a prompt is read, an adaptation runs) Ctrl-C raises at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.heeded = False

    def _pressed(self, signum: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again:
            raise Leave
        if not self.heeded:
            raise KeyboardInterrupt

    @contextmanager
    def on_interrupt(self) -> Iterator[Stop]:
        """Listen inside the block; only the main thread may."""
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
