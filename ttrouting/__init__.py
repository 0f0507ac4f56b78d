"""ttrouting: adapt the routing of Mixture-of-Experts language models at test time, without training.

What `__all__` names is the public API; it is imported when it is first asked for, so that a command's help does
not wait for torch. Strategies are attributes too (`ttr.Rerouting`, `ttr.SCMoE` ...), plugins' included.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttrouting.adaptive import AdaptiveModel, adapt
    from ttrouting.artefacts import load, save
    from ttrouting.calibration import calibrate
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
    from ttrouting.refsets import ReferenceSet
    from ttrouting.registry import StrategyInfo, get_strategy, list_strategies
    from ttrouting.report import Report
    from ttrouting.shared_fit import SharedFit, fit_shared_delta
    from ttrouting.sites import Site, find_sites
    from ttrouting.state import AdaptationState
    from ttrouting.strategies.c3po import C3PO
    from ttrouting.strategies.dynamic_k import DynamicK
    from ttrouting.strategies.expert_mask import ExpertMask
    from ttrouting.strategies.rerouting import Rerouting
    from ttrouting.strategies.scmoe import SCMoE
    from ttrouting.strategies.static_routing import StaticRouting
    from ttrouting.strategies.task_delta import TaskDelta
    from ttrouting.strategy import DecodingRun, DecodingStrategy, RoutingRun, RoutingStrategy
    from ttrouting.trace import RoutingTrace

__version__ = "0.1.0"

_HOMES = {
    "ttrouting.adaptive": ("AdaptiveModel", "adapt"),
    "ttrouting.artefacts": ("load", "save"),
    "ttrouting.calibration": ("calibrate",),
    "ttrouting.errors": (
        "ArtefactError",
        "CompositionError",
        "ConfigError",
        "CoverageError",
        "ModelBusy",
        "NotMoEError",
        "TTRoutingError",
        "UnsupportedCallError",
        "UnsupportedModelError",
    ),
    "ttrouting.pocket": ("load_pocket",),
    "ttrouting.registry": ("StrategyInfo", "get_strategy", "list_strategies"),
    "ttrouting.refsets": ("ReferenceSet",),
    "ttrouting.report": ("Report",),
    "ttrouting.sites": ("Site", "find_sites"),
    "ttrouting.shared_fit": ("SharedFit", "fit_shared_delta"),
    "ttrouting.state": ("AdaptationState",),
    "ttrouting.strategy": ("DecodingRun", "DecodingStrategy", "RoutingRun", "RoutingStrategy"),
    "ttrouting.trace": ("RoutingTrace",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "C3PO",
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
    "ReferenceSet",
    "Report",
    "Rerouting",
    "RoutingRun",
    "RoutingStrategy",
    "RoutingTrace",
    "SCMoE",
    "SharedFit",
    "Site",
    "StaticRouting",
    "StrategyInfo",
    "TTRoutingError",
    "TaskDelta",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "adapt",
    "calibrate",
    "find_sites",
    "fit_shared_delta",
    "get_strategy",
    "list_strategies",
    "load",
    "load_pocket",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name[:1].isupper():  # strategies by class name: no module here has to know which there are
        from ttrouting.registry import list_strategies

        value = next((info.cls for info in list_strategies() if info.cls.__name__ == name), None)
        if value is None:
            raise AttributeError(f"module 'ttrouting' has no attribute {name!r}")
    else:
        raise AttributeError(f"module 'ttrouting' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
