"""Did one way of answering the same questions do better than another? Exact statistics, in words.

Legend: `n` questions; `won` were right only under the second way, `lost` only under the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Paired:
    """Two ways on the same questions.

    Attributes:
        n: questions. before, after: right answers of either way. won, lost: answers that changed.
    """

    n: int
    before: int
    after: int
    won: int
    lost: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Count right answers, question by question."""
        pairs = list(zip(before, after, strict=True))
        won, lost = (sum(1 for b, a in pairs if b == first and a != first) for first in (False, True))
        return cls(len(pairs), sum(before), sum(after), won, lost)

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: were `won` and `lost` two sides of a fair coin?"""
        tosses = self.won + self.lost
        tail = sum(comb(tosses, i) for i in range(min(self.won, self.lost) + 1)) / 2**tosses
        return min(1.0, 2 * tail)

    def verdict(self, comparisons: int = 1) -> str:
        """`better`, `worse`, `no difference` or `cannot tell`, at 5 % over all comparisons together (Bonferroni)."""
        if self.won + self.lost == 0:
            return "no difference"
        if self.p_value >= 0.05 / comparisons:
            return "cannot tell"
        return "better" if self.won > self.lost else "worse"


def exact_interval(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share: `right` of `n`."""
    tail = (1 - level) / 2
    low = 0.0 if right == 0 else _solve(lambda p: 1 - _cdf(right - 1, n, p), tail)
    high = 1.0 if right == n else _solve(lambda p: 1 - _cdf(right, n, p), 1 - tail)
    return low, high


def _cdf(k: int, n: int, p: float) -> float:
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _solve(rising: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2
