"""ALoRA (Liu et al. 2024): LoRA whose ranks move while it trains."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.allocator import Allocator
from loralloc.allocation.choices import is_gathered, learns_from_batches
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.module_names import by_kind
from loralloc.allocation.presets import check_read
from loralloc.allocation.record import FILE_NAME, Record, Round
from loralloc.allocation.schedule import Schedule, place_rounds
from loralloc.methods.lora import Lora
from loralloc.methods.method import IS_A_BLOCK, About
from loralloc.methods.restore import (
    check_scaling,
    give_ranks,
    load_weights,
    ranks_for,
)
from loralloc.methods.session import Length, Session, Wants

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Alora(Lora):
    """Importance by ablating single ranks (AB-LoRA); its rounds are its `Allocator`'s."""

    allocation: AllocationConfig = field(
        default_factory=AllocationConfig, metadata={IS_A_BLOCK: True}
    )
    """How ranks move."""

    about: ClassVar[About] = About(
        name="alora",
        title="ALoRA",
        paper="Liu et al. 2024",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is between rounds; its paper has 1e-4 for every method",
        merges=True,
    )
    allocates: ClassVar[bool] = True

    adapter_name: str = field(default="default", init=False)
    """PEFT's name of the adapter whose ranks move."""

    steps: list[int] = field(default_factory=list, init=False)
    """Optimiser steps after which a round takes place."""

    _schedule: Schedule | None = field(default=None, init=False, repr=False, compare=False)
    _allocator: Allocator | None = field(default=None, init=False, repr=False, compare=False)
    _session: Session | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what its rounds do not read.

        Raises:
            ValueError: An option is for shrinking.
        """
        if self.allocation.preset == "shrink":
            raise ValueError(
                f'`preset` is "shrink", and {self.about.name} moves ranks; use `--method shrink`, '
                "or attach() without a method."
            )
        check_read(self.allocation)

    @classmethod
    def on(cls, model: Any, config: AllocationConfig, *, adapter_name: str) -> Alora:
        """The method on a model that has its LoRA adapter already.

        Args:
            model: A PEFT model.
            config: How ranks move.
            adapter_name: PEFT's name of the adapter.
        """
        method = cls(allocation=config)
        method.model, method.adapter_name = model, adapter_name
        return method

    def bears_scaled_loss(self) -> bool:
        """See `Method.bears_scaled_loss`: a score that is gathered reads gradients of training.

        Fused optimisers skip steps by themselves, and nothing tells that they did.
        """
        return not is_gathered(self.allocation) or self.allocation.score in ("norm", "random")

    @property
    def allocator(self) -> Allocator:
        """What carries out the rounds, once a run has taken the method up."""
        assert self._allocator is not None, "a run calls join()"
        return self._allocator

    @property
    def record(self) -> Record:
        """The rounds so far."""
        return self.allocator.record

    @property
    def config(self) -> AllocationConfig:
        """How ranks move in this run, with its seed."""
        return self.allocator.config

    @property
    def num_pruned(self) -> int:
        """Ranks pruned a round."""
        return self.allocator.num_pruned

    @property
    def round_in_words(self) -> str:
        """What a round does, for people."""
        return f"{self.num_pruned} ranks"

    def wants(self, length: Length) -> Wants:
        """See `Method.wants`: what the score reads; of gates, the other half until the last round.

        Raises:
            ValueError: The rounds do not fit into the run.
        """
        config = self.allocation
        self._schedule = place_rounds(
            config, steps_per_epoch=length.steps_per_epoch, max_steps=length.num_steps
        )
        self.steps = list(self._schedule.steps)
        self.place_anew()
        return Wants(
            held_out=0 if is_gathered(config) else config.scoring_examples,
            half_until=self.steps[-1] if learns_from_batches(config) else 0,
            seed=config.seed,
        )

    def join(self, session: Session) -> None:
        """See `Method.join`.

        Raises:
            ValueError: The options do not fit the model or the scoring examples.
            TypeError: The adapter has a part that rank allocation is not defined for.
        """
        if self.allocation.seed is None:
            self.allocation = dataclasses.replace(self.allocation, seed=session.seed)
        self._session = session
        self._allocate()
        self.check_optimizer(session.optimizer)  # where the user gave one

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """See `Method.check_optimizer`."""
        self.allocator.check_optimizer(optimizer)

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: The run goes on at a step by which other rounds were due.
            TypeError: Ranks cannot move under the optimiser.
        """
        self.allocator.begin(session.optimizer)
        past = sum(step <= session.steps_done for step in self.steps)
        if past < len(self.record.rounds):
            raise ValueError(
                f"Training begins at step {session.steps_done}, and the ranks have moved in "
                f"{len(self.record.rounds)} rounds already, of a train() before this one; go on "
                "with `train(resume_from_checkpoint=...)`, or detach() for training without rounds."
            )
        if past != len(self.record.rounds):
            raise ValueError(
                f"The run continues at step {session.steps_done}, before which {past} rounds of "
                f"allocation are due, but {len(self.record.rounds)} took place; resume from a "
                f"checkpoint that holds {FILE_NAME}, with the options it was begun with."
            )

    def before_step(self) -> None:
        """See `Method.before_step`: gates learn, where the score is theirs."""
        if learns_from_batches(self.allocation) and self._has_rounds_ahead:
            assert self._session is not None, "a run calls join()"
            self.model.train()
            self.allocator.learn(self._session.of_second_half())

    def step(self, number: int) -> None:
        """See `Method.step`: what is gathered from gradients is."""
        self.allocator.observe()

    def after_step(self, number: int, epoch: float) -> bool:
        """See `Method.after_step`: a round, where one is due."""
        if number not in self.steps:
            return False
        self._take_round(number, epoch)
        return True

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`: after the last round."""
        return self.steps[-1]

    def finish(self) -> None:
        """See `Method.finish`: plain LoRA, whose ranks have moved."""
        self.release()
        if not self.record.rounds:
            assert self._session is not None, "a run calls join()"
            raise RuntimeError(
                f"Training ended at step {self._session.steps_done}, before the first round of "
                f"allocation at step {self.steps[0]}: the adapter is plain LoRA; train longer or "
                "lower `warmup_epochs`."
            )
        note = self.record.churn_note
        if note and replicas.is_first():
            logger.warning("loralloc: %s.", note)

    def release(self) -> None:
        """See `Method.release`: gates leave the model, and steps are the optimiser's own again."""
        if self._allocator is not None:
            self._allocator.finish()
            self._allocator.release()

    def unfinished(self) -> str:
        """See `Method.unfinished`."""
        if self._allocator is None or self.record.rounds:
            return ""
        return (
            "The adapter was to be allocated, but no round has taken place: it is plain LoRA; "
            f"train until the round after step {self.steps[0]} first."
        )

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`: with the record of the rounds."""
        super().save(folder, **options)
        if self._allocator is not None and options.get("is_main_process", True):
            self.record.save(folder)

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`: scaling, and every option of the allocation."""
        check_scaling(self.model, folder, adapter_name=self.adapter_name)
        if self._allocator is not None:
            _check_same(Record.load(folder).config, self.record.config, str(folder))

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        if self._allocator is None:
            super().load(folder)
            return
        assert self._session is not None, "a run calls join()"
        record = Record.load(folder)
        saved = ranks_for(self.model, folder, adapter_name=self.adapter_name)
        self._give_ranks(saved, str(folder))
        load_weights(self.model, folder)
        self._allocate(record)

    def take_up(self, record: Record, state: Mapping[str, Any]) -> None:
        """Go on from the rounds of an earlier part of the run, without a folder.

        The model gets the ranks that they left; its weights are still to be loaded.

        Args:
            record: The rounds.
            state: What `state` gave.

        Raises:
            ValueError: The run was begun with other options, or on other modules.
        """
        _check_same(record.config, self.record.config, "the checkpoint")
        self._give_ranks(record.ranks, "the checkpoint")
        self._allocate(record)
        self.load_state(state)

    def state(self) -> dict[str, Any]:
        """See `Method.state`: what a score has gathered for rounds to come."""
        gathered = self._allocator.state() if self._allocator else {}
        return {"gathered": gathered} if gathered else {}

    def needs_state(self) -> bool:
        """See `Method.needs_state`."""
        return self._allocator is not None and self._allocator.is_gathering

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if self.needs_state():
            self.allocator.load_state(state.get("gathered", {}))

    @property
    def _has_rounds_ahead(self) -> bool:
        return len(self.record.rounds) < len(self.steps)

    def _take_round(self, number: int, epoch: float) -> None:
        assert self._session is not None, "a run calls join()"
        entry = self.allocator.step(self._session.optimizer, step=number, epoch=epoch)
        self._session.log(_numbers(entry))
        if self._session.on_round:
            self._session.on_round(entry)

    def _give_ranks(self, ranks: Mapping[str, int], where: str) -> None:
        assert self._session is not None, "a run calls join()"
        self.release()
        optimizer = self._session.optimizer
        give_ranks(self.model, ranks, where, optimizer=optimizer, adapter_name=self.adapter_name)

    def place_anew(self) -> None:
        """Let rounds that were placed for another length of the run be where they are due now."""
        if self._allocator is not None and not self.record.rounds:
            self.release()
            self._allocate()

    def _allocate(self, record: Record | None = None) -> None:
        assert self._session is not None, "a run calls join()"
        self._allocator = Allocator(
            self.model,
            self.allocation,
            objective=self._session.objective,
            adapter_name=self.adapter_name,
            schedule=self._schedule,
            record=record,
        )


def _numbers(entry: Round) -> dict[str, float]:
    """A round as an entry of a run's log: what moved, where ranks are, and how scores lie."""
    numbers: dict[str, float] = {
        "round": entry.round,
        "ranks_pruned": sum(map(len, entry.pruned.values())),
        "ranks_given": sum(entry.added.values()),
        "round_seconds": entry.seconds,
    }
    if entry.churn is not None:
        numbers["churn"] = round(entry.churn, 3)
    for kind, count in by_kind(entry.ranks_after, entry.ranks_after).items():
        numbers[f"ranks/{kind}"] = count
    if entry.s_full is not None and entry.s_base is not None:
        numbers["scores/loss"], numbers["scores/loss_without_adapter"] = (
            -entry.s_full,
            -entry.s_base,
        )
    for term, values in entry.values().items():
        for name, value in zip(("low", "median", "high"), _spread(values), strict=True):
            numbers[f"scores/{term}_{name}"] = value
    return numbers


def _spread(values: Sequence[float]) -> list[float]:
    """The 5th, 50th and 95th percentile."""
    shares = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return [float(f"{value:.4g}") for value in found]


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with other options, which the record would not tell of.

    Raises:
        ValueError: An option differs.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"The run in {where} was begun with `{name}` of {before.get(name)!r}, and now it "
                f"is {value!r}; resume with the value it was begun with."
            )
