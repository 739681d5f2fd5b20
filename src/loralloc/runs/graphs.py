"""A run whose steps are replayed as CUDA graphs: which methods allow that."""

from __future__ import annotations

from transformers import Trainer

from loralloc.runs.fleet import check_plain
from loralloc.runs.settings import Settings
from loralloc.training.graphs import use_cuda_graphs


def fit_graphs(trainer: Trainer, settings: Settings) -> None:
    """Let a run's training steps be replayed; see `use_cuda_graphs`.

    Args:
        trainer: Of the run, not yet driven.
        settings: Of the run, with `cuda_graphs`.

    Raises:
        ValueError: The method reads what happens within a pass, or as `use_cuda_graphs`.
        TypeError: As `use_cuda_graphs`.
    """
    check_plain(settings, what="CUDA graphs replay", otherwise="leave `cuda_graphs` out")
    use_cuda_graphs(trainer)
