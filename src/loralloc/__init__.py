"""loralloc: LoRA that allocates its ranks while it trains.

The public names are loaded when they are first used, so that importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralloc.allocation.allocator import Allocator as Allocator
    from loralloc.allocation.choices import Score as Score
    from loralloc.allocation.config import AllocationConfig as AllocationConfig
    from loralloc.allocation.importance.tracker import Tracker as Tracker
    from loralloc.allocation.policy import Limits as Limits
    from loralloc.allocation.policy import Plan as Plan
    from loralloc.allocation.policy import Policy as Policy
    from loralloc.allocation.policy import Scores as Scores
    from loralloc.allocation.policy import plan as plan
    from loralloc.allocation.record import Record as Record
    from loralloc.allocation.record import Round as Round
    from loralloc.allocation.record import Size as Size
    from loralloc.allocation.refusals import ScoringError as ScoringError
    from loralloc.allocation.resize import resize as resize
    from loralloc.methods.catalog import get_method as get_method
    from loralloc.methods.method import Method as Method
    from loralloc.methods.opening import open_adapter as open_adapter
    from loralloc.runs.fleet import FleetRuns as FleetRuns
    from loralloc.runs.run import Run as Run
    from loralloc.runs.run import prepare as prepare
    from loralloc.runs.run import train as train
    from loralloc.training.attach import attach as attach
    from loralloc.training.drive import Driver as Driver
    from loralloc.training.drive import detach as detach
    from loralloc.training.drive import drive as drive
    from loralloc.training.follow import follow as follow
    from loralloc.training.graphs import use_cuda_graphs as use_cuda_graphs
    from loralloc.training.loss import use_supervised_loss as use_supervised_loss
    from loralloc.training.speed_up import speed_up as speed_up

__version__ = "0.1.0"

_HOMES = {
    "AllocationConfig": "allocation.config",
    "Allocator": "allocation.allocator",
    "Driver": "training.drive",
    "FleetRuns": "runs.fleet",
    "Limits": "allocation.policy",
    "Method": "methods.method",
    "Plan": "allocation.policy",
    "Policy": "allocation.policy",
    "Record": "allocation.record",
    "Round": "allocation.record",
    "Run": "runs.run",
    "Score": "allocation.choices",
    "Scores": "allocation.policy",
    "ScoringError": "allocation.refusals",
    "Size": "allocation.record",
    "Tracker": "allocation.importance.tracker",
    "attach": "training.attach",
    "detach": "training.drive",
    "drive": "training.drive",
    "follow": "training.follow",
    "get_method": "methods.catalog",
    "open_adapter": "methods.opening",
    "plan": "allocation.policy",
    "prepare": "runs.run",
    "resize": "allocation.resize",
    "speed_up": "training.speed_up",
    "train": "runs.run",
    "use_cuda_graphs": "training.graphs",
    "use_supervised_loss": "training.loss",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loralloc' has no attribute {name!r}")
    return getattr(import_module(f"loralloc.{_HOMES[name]}"), name)
