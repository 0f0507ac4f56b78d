"""How long did each phase of an adaptation take?"""

from __future__ import annotations

from time import perf_counter


class Clock:
    """Milliseconds of each phase, by name; it runs from when it is made."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        """The phase that ends now."""
        now = perf_counter()
        self.milliseconds[name] = round(1000 * (now - self._last), 3)
        self._last = now
