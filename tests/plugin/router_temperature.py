"""How does a package of its own add a routing strategy? This module and its pyproject.toml are the whole answer.

Legend: `N` tokens of a forward, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range


@dataclass(frozen=True)
class RouterTemperature(RoutingStrategy):
    """Divide router logits by a temperature: above 1 the chosen experts weigh more alike, below 1 less.

    The choice itself moves only where a family's scoring is not monotonous in the logits alone (groups, biases).

    Args:
        temperature: above 0; 1 changes nothing.
    """

    name: ClassVar[str] = "router_temperature"
    summary: ClassVar[str] = "flatter or sharper weights of the chosen experts; costs one division a layer"
    order: ClassVar[int] = 15

    temperature: float = 2.0

    def __post_init__(self) -> None:
        in_range(self.name, "temperature", self.temperature, 0, open_low=True)

    @property
    def identity(self) -> bool:
        """No hook for a temperature of 1."""
        return self.temperature == 1

    def start(self, session: Session) -> RoutingRun:
        """Nothing changes during a call, so there is no state."""
        return _Run(self, session)


class _Run(RoutingRun):
    strategy: RouterTemperature

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        return logits / self.strategy.temperature  # [N, E]
