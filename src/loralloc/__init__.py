"""loralloc: LoRA that allocates its ranks while it trains.

The public names are loaded when they are first used, so that importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralloc.allocation.allocator import Allocator as Allocator
    from loralloc.allocation.allocator import ScoringError as ScoringError
    from loralloc.allocation.config import AllocationConfig as AllocationConfig
    from loralloc.allocation.policy import Limits as Limits
    from loralloc.allocation.policy import Plan as Plan
    from loralloc.allocation.policy import Scores as Scores
    from loralloc.allocation.policy import plan as plan
    from loralloc.allocation.record import Record as Record
    from loralloc.allocation.record import Round as Round
    from loralloc.allocation.resize import resize as resize
    from loralloc.methods.opening import open_adapter as open_adapter
    from loralloc.training.attach import AllocationCallback as AllocationCallback
    from loralloc.training.attach import attach as attach
    from loralloc.training.supervised import use_supervised_loss as use_supervised_loss

__version__ = "0.1.0"

_HOMES = {
    "AllocationCallback": "training.attach",
    "AllocationConfig": "allocation.config",
    "Allocator": "allocation.allocator",
    "Limits": "allocation.policy",
    "Plan": "allocation.policy",
    "Record": "allocation.record",
    "Round": "allocation.record",
    "Scores": "allocation.policy",
    "ScoringError": "allocation.allocator",
    "attach": "training.attach",
    "open_adapter": "methods.opening",
    "plan": "allocation.policy",
    "resize": "allocation.resize",
    "use_supervised_loss": "training.supervised",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loralloc' has no attribute {name!r}")
    return getattr(import_module(f"loralloc.{_HOMES[name]}"), name)
