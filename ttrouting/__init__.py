"""ttrouting: adapt the routing of Mixture-of-Experts language models at test time, without training.

What this module names is the public API. Strategies are attributes too (`ttr.Rerouting`, `ttr.SCMoE` ...),
found when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ttrouting.adaptive import AdaptiveModel, adapt
from ttrouting.artefacts import load, save
from ttrouting.calibrate import calibrate
from ttrouting.errors import (
    ArtefactError,
    CompositionError,
    ConfigError,
    CoverageError,
    ModelBusy,
    NotMoEError,
    TTRoutingError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from ttrouting.pocket import load_pocket
from ttrouting.registry import StrategyInfo, get_strategy, list_strategies
from ttrouting.report import Report
from ttrouting.sites import Site, find_sites
from ttrouting.state import AdaptationState
from ttrouting.strategy import DecodingRun, DecodingStrategy, RoutingRun, RoutingStrategy

if TYPE_CHECKING:
    from ttrouting.strategies.dynamic_k import DynamicK
    from ttrouting.strategies.expert_mask import ExpertMask
    from ttrouting.strategies.rerouting import Rerouting
    from ttrouting.strategies.scmoe import SCMoE
    from ttrouting.strategies.static_routing import StaticRouting

__version__ = "0.1.0"

__all__ = [
    "AdaptationState",
    "AdaptiveModel",
    "ArtefactError",
    "CompositionError",
    "ConfigError",
    "CoverageError",
    "DecodingRun",
    "DecodingStrategy",
    "DynamicK",
    "ExpertMask",
    "ModelBusy",
    "NotMoEError",
    "Report",
    "Rerouting",
    "RoutingRun",
    "RoutingStrategy",
    "SCMoE",
    "Site",
    "StaticRouting",
    "StrategyInfo",
    "TTRoutingError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "adapt",
    "calibrate",
    "find_sites",
    "get_strategy",
    "list_strategies",
    "load",
    "load_pocket",
    "save",
]


def __getattr__(name: str) -> Any:
    # strategies by class name: no module here has to know which there are
    if not name.startswith("_"):
        for info in list_strategies():
            if info.cls.__name__ == name:
                return info.cls
    raise AttributeError(f"module 'ttrouting' has no attribute {name!r}")
