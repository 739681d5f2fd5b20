"""What a method wants of a run, and what it is given by it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.record import Round


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is."""

    num_steps: int
    """Optimiser steps of the whole run, without those that a method takes on top."""

    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What a method asks of a run beyond its batches, before it begins."""

    held_out: int = 0
    """Development examples to measure on."""

    half_until: int = 0
    """Optimiser steps during which the weights see one half of the training examples (drawn by the
    seed), and the method the other; see `Session.second_half`."""

    seed: int | None = None
    """Seed by which examples are drawn; None for the run's."""

    on_top: int = 0
    """Optimiser steps that a search takes before those of the run, which are as many as without."""

    restart_at: int = 0
    """The step after which the learning rate's schedule begins anew."""


@dataclass(kw_only=True)
class Session:
    """What a run gives a method to work with, from its first step to its last."""

    optimizer: Any = None
    """The `torch.optim.Optimizer` that trains the model; before training begins, one that the user
    gave, or None."""

    num_steps: int
    """Optimiser steps of the whole run, those on top among them."""

    search_steps: int = 0
    """How many of them, the first, a search takes on top; see `Wants.on_top`."""

    steps_per_epoch: int

    steps_done: int = 0
    """Optimiser steps so far, those before a resumed checkpoint among them."""

    batches_per_step: int = 1
    """Batches whose gradients an optimiser step adds up."""

    loss: Callable[[Batch], Tensor]
    """Mean loss of the model on a batch, with its graph, in the mode the model is in. Of processes
    with a batch each it is weighted, so that the average of their gradients is the mean's."""

    training: Callable[[int], Sequence[Batch]] = lambda num_examples: ()
    """So many training examples, drawn by the seed, in micro-batches; the order in which the run
    sees its examples stays as it is."""

    second_half: Iterator[Batch] = dataclasses.field(default_factory=lambda: iter(()))
    """Training batches that the weights are not trained on, without end; see `Wants.half_until`."""

    objective: Objective | None = None
    """What the trainer minimises, on development examples where the method wants some (see
    `Wants.held_out`); None where it wants neither these nor a half of the training examples."""

    seed: int = 0

    log: Callable[[Mapping[str, float]], None] = lambda numbers: None
    """Writes an entry into the run's log."""

    on_round: Callable[[Round], None] | None = None
    """Called with each round of allocation once it has taken place."""

    def of_second_half(self) -> Iterator[Batch]:
        """A step's batches of the second half: as many as its own are."""
        return itertools.islice(self.second_half, self.batches_per_step)
