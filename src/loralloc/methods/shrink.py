"""The smallest adapter that loses nothing: pruning by AB-LoRA for as long as held-out loss allows.

Ours. LoRA trains with the same rank everywhere; then every module takes its singular form, a share
of the ranks goes in every round, those of the smallest singular values of all modules, and nobody
receives. Before each round the
size that is there is judged on held-out examples, pair by pair with the lowest loss before. One
that is worse is given up for the one before, as it was then, and the rest of the run trains that.
One that is better still learns: its round passes, since a smaller size would only seem as good.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.choices import is_gathered, learns_from_batches
from loralloc.allocation.comparison import (
    Comparison,
    ExampleLosses,
    costs,
    divide,
    num_parameters,
)
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.objective import Objective
from loralloc.allocation.presets import check_read
from loralloc.allocation.record import Record, Size
from loralloc.allocation.resize import resize
from loralloc.allocation.shrinking import (
    first_look,
    last_look,
    num_to_prune,
    place_sizes,
    prune,
    share_towards,
)
from loralloc.allocation.singular import take_singular_form
from loralloc.allocation.snapshot import Snapshot
from loralloc.methods.alora import Alora
from loralloc.methods.method import About, Length, Session, Wants

SINGULAR = "norm"
"""The score of ranks in singular form: there |s B_i| |A_i| is the singular value."""


@dataclass(kw_only=True)
class Shrink(Alora):
    """LoRA that ends with the smallest size it passed whose held-out loss is not worse.

    Of `allocation` it reads what `allocation.presets.SHRINK` names.
    """

    about: ClassVar[About] = About(
        name="shrink",
        title="Shrink",
        paper="no paper of its own",
        status="ours",
        initialisation="published",
        settings="ours",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is between rounds",
        differs="Prunes only: the smallest singular values of all modules, or by ALoRA's "
        "importance of ranks as they are, once held-out loss has levelled off and for as long as "
        "it, compared example by example, is not worse than the lowest before; then the size "
        "before comes back. How many parameters it ends with is what it finds.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {}

    _snapshot: Snapshot | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    _comparison: Comparison | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    _scoring: Objective | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Take the preset, and refuse what it does not read.

        Raises:
            ValueError: An option is for moving ranks, or a score for pruning by scores.
        """
        self.allocation = dataclasses.replace(self.allocation, preset="shrink")
        check_read(self.allocation)
        if self.allocation.prune_by == "singular-values":
            if self.allocation.score not in (AllocationConfig.score, SINGULAR):
                raise ValueError(
                    f"`score` is {self.allocation.score!r}, which is read where shrinking prunes "
                    'by it; add `prune_by` "scores", or leave it out.'
                )
            self.allocation = dataclasses.replace(self.allocation, score=SINGULAR)

    @property
    def is_over(self) -> bool:
        """Whether the size it has is the one it ends with."""
        return self._ended(self.record)

    @property
    def round_in_words(self) -> str:
        """See `Alora.round_in_words`."""
        target = self.allocation.target_parameters
        if target is not None:
            return f"an equal share, down to {target:,} parameters"
        return f"{self.allocation.prune_share:.0%} of the ranks left"

    def wants(self, length: Length) -> Wants:
        """See `Method.wants`: examples to score ranks on, and others to judge sizes by.

        Raises:
            ValueError: The rounds do not fit into the run, or the score cannot be used.
        """
        config = self.allocation
        if learns_from_batches(config):
            raise ValueError(
                f"`score` is {config.score!r}, whose gates are a part of the model until the last "
                "round, so that sizes cannot be compared; use another score."
            )
        self._schedule = place_sizes(
            config, steps_per_epoch=length.steps_per_epoch, max_steps=length.num_steps
        )
        rounds = self._schedule.steps
        before = first_look(rounds) if config.target_parameters is None else None
        self.steps = [
            *([before] if before else []),
            *rounds,
            last_look(rounds, length.num_steps),
        ]
        return Wants(held_out=self._num_scoring + config.judging_examples, seed=config.seed)

    def join(self, session: Session) -> None:
        """See `Alora.join`.

        Raises:
            ValueError: The target is no size that the adapter can shrink to.
        """
        assert session.objective is not None, "it wants held-out examples"
        self._scoring, judging = divide(session.objective, self._num_scoring)
        self._comparison = Comparison(
            judging, tolerance=self.allocation.tolerance, adapter_name=self.adapter_name
        )
        super().join(session)
        self._check_target()

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: The run goes on at a step by which other sizes were to be judged.
            TypeError: Ranks cannot move under the optimiser.
        """
        self.allocator.check_optimizer(session.optimizer)
        due = sum(step <= session.steps_done for step in self.steps)
        found = len(self.record.frontier)
        if found != due and not (self.is_over and found <= due):
            raise ValueError(
                f"The run continues at step {session.steps_done}, before which {due} sizes of the "
                f"adapter are to be judged, but {found} were; resume from a checkpoint that was "
                "begun with these options."
            )

    def after_step(self, number: int, epoch: float) -> bool:
        """See `Method.after_step`: judge the size there is, then prune, wait, or step back."""
        if number not in self.steps or self.is_over:
            return False
        size = self._judge(number)
        if not size.kept:
            self._step_back()
            return True
        self._snapshot = None
        assert self._schedule is not None, "a run calls wants()"
        waits = size.falling and self.allocation.target_parameters is None
        if number not in self._schedule.steps or waits:
            return False
        return self._prune(number, epoch)

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`: once the size is found."""
        sizes = self.record.frontier
        worse = next((size.step for size in sizes if not size.kept), None)
        return self.steps[-1] if worse is None else worse

    def finish(self) -> None:
        """See `Method.finish`: the size that was found, with its loss at the end.

        A run that ends before the last look is judged as it is, and steps back where it has to.
        """
        assert self._session is not None, "a run calls join()"
        self.allocator.finish()
        step, was_over = self._session.steps_done, self.is_over
        if not self.record.frontier:
            raise RuntimeError(
                f"Training ended at step {step}, before the first size was judged at step "
                f"{self.steps[0]}: the adapter is LoRA as it began; train longer."
            )
        if not self._judge(step, at_the_end=was_over).kept:
            self._step_back()

    def unfinished(self) -> str:
        """See `Method.unfinished`."""
        if self._allocator is None or self.record.frontier:
            return ""
        return (
            "The adapter was to be shrunk, but no size was judged: it is LoRA as it began; call "
            "trainer.train() first."
        )

    def load(self, folder: Path) -> None:
        """See `Method.load`: by way of the size that a step back would lead to."""
        self._snapshot = None
        if self._allocator is not None:
            assert self._session is not None, "a run calls join()"
            before = self._to_step_back_to(Record.load(folder))
            if before:
                resize(
                    self.model,
                    before,
                    optimizer=self._session.optimizer,
                    adapter_name=self.adapter_name,
                )
                self._snapshot = Snapshot.of_structure(self.model, self.adapter_name)
        super().load(folder)

    def state(self) -> dict[str, Any]:
        """See `Method.state`: the best losses, and the size to step back to."""
        state = super().state()
        if self._comparison is not None and self._comparison.best is not None:
            state["best"] = self._comparison.best._asdict()
        if self._snapshot is not None:
            state["snapshot"] = self._snapshot.state()
        return state

    def needs_state(self) -> bool:
        """See `Method.needs_state`."""
        return self._allocator is not None

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if super().needs_state():
            super().load_state(state)
        if self._comparison is not None and "best" in state:
            self._comparison.best = ExampleLosses(**state["best"])
        if self._snapshot is not None:
            self._snapshot.load_state(state["snapshot"])

    @property
    def _num_scoring(self) -> int:
        """Held-out examples that importance is measured on."""
        return 0 if is_gathered(self.allocation) else self.allocation.scoring_examples

    def _ended(self, record: Record) -> bool:
        """Whether a size was worse, or all were looked at."""
        sizes = record.frontier
        return len(sizes) >= len(self.steps) or not all(size.kept for size in sizes)

    def _ranks(self) -> dict[str, int]:
        return ranks(lora_layers(self.model, self.adapter_name), self.adapter_name)

    def _allocate(self, record: Record | None = None) -> None:
        target = self.allocation.target_parameters or 0
        self._allocator = Allocator(
            self.model,
            self.allocation,
            objective=self._scoring,
            adapter_name=self.adapter_name,
            policy=functools.partial(
                prune, costs=costs(self.model, self.adapter_name), least=target
            ),
            schedule=self._schedule,
            record=record,
        )

    def _judge(self, step: int, *, at_the_end: bool = False) -> Size:
        """Enter the size into the frontier, and say how it did.

        One that was kept before, and waited, stays.

        Args:
            step: Optimiser steps so far.
            at_the_end: Whether it stays whatever its loss.
        """
        assert self._comparison is not None and self._session is not None, "a run calls join()"
        parameters = num_parameters(self.model, self.adapter_name)
        waited = any(size.parameters == parameters for size in self.record.frontier)
        stays = waited or at_the_end or self.allocation.target_parameters is not None
        size = self._comparison.size_now(step=step, stays=stays)
        self.record.frontier.append(size)
        self._session.log(
            {
                "held_out_loss": size.loss,
                "held_out_worse_by": size.worse_by,
                "parameters": size.parameters,
            }
        )
        return size

    def _prune(self, number: int, epoch: float) -> bool:
        """A round, if a rank can go; whether one did. What to step back to is kept before."""
        assert self._session is not None, "a run calls join()"
        count = self._num_to_prune(rounds_left=len(self.steps) - 1 - self.steps.index(number))
        if not count:
            return False
        if self.allocation.prune_by == "singular-values":
            take_singular_form(self.model, self._session.optimizer, adapter_name=self.adapter_name)
        if self.allocation.target_parameters is None:
            self._snapshot = Snapshot.take(
                self.model, self._session.optimizer, adapter_name=self.adapter_name
            )
        self.allocator.num_pruned = count
        self._take_round(number, epoch)
        return True

    def _num_to_prune(self, *, rounds_left: int) -> int:
        """Ranks that the next round prunes; on the way to a target, at most."""
        config, by_module = self.allocation, self._ranks().values()
        num_open = sum(max(0, rank - config.min_rank) for rank in by_module)
        share, target = config.prune_share, config.target_parameters
        if target is not None:
            parameters = num_parameters(self.model, self.adapter_name)
            if parameters <= target:
                return 0
            if rounds_left == 1:
                return num_open
            share = share_towards(target, parameters, rounds_left)
        return min(num_to_prune(sum(by_module), share), num_open)

    def _step_back(self) -> None:
        """Bring the size before back; the round that took it away leaves the record."""
        assert self._session is not None and self._snapshot is not None, "a round was taken"
        self._snapshot.restore(self.model, self._session.optimizer)
        self._snapshot = None
        self.record.rounds.pop()
        self.allocator.finish()

    def _to_step_back_to(self, record: Record) -> dict[str, int]:
        """The ranks of the size before, where a resumed run may have to come back to it."""
        steps_back = self.allocation.target_parameters is None and not self._ended(record)
        if not steps_back or not record.rounds:
            return {}
        if record.frontier[-1].step > record.rounds[-1].step:  # it was kept, and waits
            return {}
        before, now = record.rounds[-1].ranks_before, self._ranks()
        return {name: rank for name, rank in before.items() if rank or name in now}

    def _check_target(self) -> None:
        """Refuse a target that is no smaller size, or one that no rank fits.

        Raises:
            ValueError: With the sizes that there can be.
        """
        target = self.allocation.target_parameters
        if target is None or self.record.rounds:
            return
        now, cost = self._ranks(), costs(self.model, self.adapter_name)
        has = num_parameters(self.model, self.adapter_name)
        floor = sum(min(rank, self.allocation.min_rank) * cost[name] for name, rank in now.items())
        least = max(floor, *cost.values())
        if not least <= target < has:
            raise ValueError(
                f"`target_parameters` is {target:,}, but the adapter has {has:,} and cannot be "
                f"sure to shrink to fewer than {least:,}; name a number between."
            )
