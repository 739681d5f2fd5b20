"""The smallest adapter that loses nothing: pruning for as long as held-out loss does not feel it.

Ours. LoRA trains with the same rank everywhere; then in every round each module takes its singular
form, in which it computes the same, and the smallest singular values of all modules go; nobody
receives. What that costs is told at once, on held-out examples and pair by pair, before any rank is
gone: where it costs too much, half as many are tried, and a quarter, and else the round passes. One
before which training still lowered the loss passes too: a smaller adapter might learn more slowly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loralloc.allocation import replicas
from loralloc.allocation.allocator import Allocator
from loralloc.allocation.choices import is_gathered, learns_from_batches
from loralloc.allocation.comparison import ExampleLosses, divide, losses_without, num_parameters
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost, ranks
from loralloc.allocation.named import name_of
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Plan, Scores
from loralloc.allocation.presets import check_read
from loralloc.allocation.record import Record, Size
from loralloc.allocation.shrinking import (
    SHARES,
    Difference,
    is_as_good,
    num_to_prune,
    paired_difference,
    place_sizes,
    prune,
    share_towards,
    still_falls,
)
from loralloc.allocation.singular import take_singular_form
from loralloc.methods.alora import Alora
from loralloc.methods.method import About
from loralloc.methods.session import Length, Session, Wants

SINGULAR = "norm"
"""The score of ranks in singular form: there |s B_i| |A_i| is the singular value."""


@dataclass(kw_only=True)
class Shrink(Alora):
    """LoRA that is pruned for as long as held-out loss does not feel it.

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
        differs="Prunes only, in the second half of a run: the smallest singular values of all "
        "modules, or by ALoRA's importance of ranks as they are, as many as held-out loss, "
        "compared example by example before and after, does not feel. How many parameters it ends "
        "with is what it finds.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {}
    finds_its_size: ClassVar[bool] = True

    _scoring: Objective | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    _judging: Objective | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    _last_look: ExampleLosses | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Take the preset, and refuse what it does not read.

        Raises:
            ValueError: An option is for moving ranks, or a score for pruning by scores.
        """
        self.allocation = dataclasses.replace(self.allocation, preset="shrink")
        check_read(self.allocation)
        if name_of(self.allocation.score) == "screened":
            raise ValueError(
                "`score` is 'screened', which asks what is pruned more than once, while shrink "
                "judges each answer by held-out loss and keeps it; use 'gradient' or 'ablation'."
            )
        if self.allocation.prune_by == "singular-values":
            if self.allocation.score not in (AllocationConfig.score, SINGULAR):
                raise ValueError(
                    f"`score` is {self.allocation.score!r}, which is read where shrinking prunes "
                    'by it; add `prune_by` "scores", or leave it out.'
                )
            self.allocation = dataclasses.replace(self.allocation, score=SINGULAR)

    @property
    def round_in_words(self) -> str:
        """See `Alora.round_in_words`."""
        target = self.allocation.target_parameters
        if target is not None:
            return f"an equal share, down to {target:,} parameters"
        return f"at most {self.allocation.prune_share:.0%} of the ranks left"

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
        self.steps = list(self._schedule.steps)
        self.place_anew()
        return Wants(held_out=self._num_scoring + config.judging_examples, seed=config.seed)

    def join(self, session: Session) -> None:
        """See `Alora.join`.

        Raises:
            ValueError: The target is no size that the adapter can shrink to.
        """
        assert session.objective is not None, "it wants held-out examples"
        self._scoring, self._judging = divide(session.objective, self._num_scoring)
        self._last_look = None
        super().join(session)
        self._check_target()

    def finish(self) -> None:
        """See `Method.finish`: the size that was found, with its loss at the end."""
        assert self._session is not None, "a run calls join()"
        self.release()
        step = self._session.steps_done
        if not self.record.frontier:
            raise RuntimeError(
                f"Training ended at step {step}, before the first round at step {self.steps[0]}: "
                "the adapter is LoRA as it began; train longer."
            )
        self._enter(self._ranks(), self._losses(), Difference(0.0, 0.0), kept=True)

    def unfinished(self) -> str:
        """See `Method.unfinished`."""
        if self._allocator is None or self.record.frontier:
            return ""
        return (
            "The adapter was to be shrunk, but no size was judged: it is LoRA as it began; call "
            "trainer.train() first."
        )

    def state(self) -> dict[str, Any]:
        """See `Method.state`: the losses of the last look."""
        state = super().state()
        if self._last_look is not None:
            state["last_look"] = self._last_look._asdict()
        return state

    def needs_state(self) -> bool:
        """See `Method.needs_state`."""
        return self._allocator is not None

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if super().needs_state():
            super().load_state(state)
        if "last_look" in state:
            self._last_look = ExampleLosses(**state["last_look"])

    @property
    def _num_scoring(self) -> int:
        """Held-out examples that importance is measured on."""
        return 0 if is_gathered(self.allocation) else self.allocation.scoring_examples

    def _ranks(self) -> dict[str, int]:
        return ranks(lora_layers(self.model, self.adapter_name), self.adapter_name)

    def _allocate(self, record: Record | None = None) -> None:
        self._allocator = Allocator(
            self.model,
            self.allocation,
            objective=self._scoring,
            adapter_name=self.adapter_name,
            policy=self._decide,
            schedule=self._schedule,
            record=record,
        )

    def _take_round(self, number: int, epoch: float) -> None:
        if self.allocation.prune_by == "singular-values":
            assert self._session is not None, "a run calls join()"
            take_singular_form(self.model, self._session.optimizer, adapter_name=self.adapter_name)
        super()._take_round(number, epoch)

    def _decide(self, scores: Scores, limits: Limits, /) -> Plan:
        """The policy: the most of the lowest ranks whose loss is not felt, or none of them."""
        now, losses = self._ranks(), self._losses()
        if not self.record.frontier:
            self._enter(now, losses, Difference(0.0, 0.0), kept=True)
        for plan in () if self._waits(losses) else self._plans(scores, limits):
            without = self._losses(plan.pruned, limits.experts)
            difference = paired_difference(losses.sums, without.sums, without.counts)
            kept = self.allocation.target_parameters is not None or is_as_good(
                difference,
                self.allocation.tolerance,
                loss=losses.mean,
                spent=sum(size.worse_by for size in self.record.frontier if size.kept),
            )
            left = {name: plan.rank_after(name) for name in now}
            self._enter({n: r for n, r in left.items() if r}, without, difference, kept=kept)
            if kept:
                return plan
        return prune(scores, dataclasses.replace(limits, num_pruned=0), costs=self._costs())

    def _waits(self, losses: ExampleLosses) -> bool:
        """Whether the adapter still learns; the first of several rounds only looks."""
        last, self._last_look = self._last_look, losses
        if self.allocation.target_parameters is not None or len(self.steps) == 1:
            return False
        if last is None:
            return True
        difference = paired_difference(last.sums, losses.sums, losses.counts)
        return still_falls(difference, self.allocation.tolerance, loss=last.mean)

    def _plans(self, scores: Scores, limits: Limits) -> list[Plan]:
        """What a round tries, the most first; none where nothing can go."""
        config, total = self.allocation, sum(map(len, scores.importance.values()))
        open_ranks = sum(max(0, len(x) - config.min_rank) for x in scores.importance.values())
        target = config.target_parameters
        if target is None:
            counts = [num_to_prune(total, config.prune_share * part) for part in SHARES]
        else:
            counts = [self._num_towards(target, total)]
        numbers = dict.fromkeys(min(count, open_ranks) for count in counts)
        return [
            prune(
                scores,
                dataclasses.replace(limits, num_pruned=number),
                costs=self._costs(),
                least=target or 0,
            )
            for number in numbers
            if number
        ]

    def _num_towards(self, target: int, total: int) -> int:
        """Ranks that this round prunes, at most, so that the last round reaches a target."""
        parameters = num_parameters(self._ranks(), self._costs())
        rounds_left = len(self.steps) - len(self.record.rounds)
        if parameters <= target:
            return 0
        if rounds_left == 1:
            return total
        return num_to_prune(total, share_towards(target, parameters, rounds_left))

    def _losses(
        self,
        without: Mapping[str, tuple[int, ...]] | None = None,
        experts: Mapping[str, int] | None = None,
    ) -> ExampleLosses:
        """Of the held-out examples, with ranks switched off.

        Raises:
            ArithmeticError: One is not finite.
        """
        assert self._judging is not None and self._session is not None, "a run calls join()"
        found = replicas.agreed(
            losses_without(
                self._judging, without or {}, experts or {}, adapter_name=self.adapter_name
            )
        )
        if not bool(found.sums.isfinite().all()):
            raise ArithmeticError(
                f"The held-out loss at step {self._session.steps_done} is not finite, so that "
                "sizes of the adapter cannot be compared; lower the learning rate or check the "
                "data."
            )
        return found

    def _enter(
        self, by_module: Mapping[str, int], losses: ExampleLosses, cost: Difference, *, kept: bool
    ) -> None:
        """Add a size to the frontier, and to the run's log."""
        assert self._session is not None, "a run calls join()"
        size = Size(
            step=self._session.steps_done,
            parameters=num_parameters(by_module, self._costs()),
            ranks=sum(by_module.values()),
            modules=len(by_module),
            loss=losses.mean,
            worse_by=cost.mean,
            standard_error=cost.standard_error,
            kept=kept,
        )
        self.record.frontier.append(size)
        self._session.log(
            {
                "held_out_loss": size.loss,
                "held_out_worse_by": size.worse_by,
                "parameters": size.parameters,
            }
        )

    def _costs(self) -> dict[str, int]:
        """Parameters of a rank, by module."""
        layers = lora_layers(self.model, self.adapter_name)
        return {name: rank_cost(layer) for name, layer in layers.items()}

    def _check_target(self) -> None:
        """Refuse a target that is no smaller size, or one that no rank fits.

        Raises:
            ValueError: With the sizes that there can be.
        """
        target = self.allocation.target_parameters
        if target is None or self.record.rounds:
            return
        now, cost = self._ranks(), self._costs()
        has = num_parameters(now, cost)
        floor = sum(min(rank, self.allocation.min_rank) * cost[name] for name, rank in now.items())
        least = max(floor, *cost.values())
        if not least <= target < has:
            raise ValueError(
                f"`target_parameters` is {target:,}, but the adapter has {has:,} and cannot be "
                f"sure to shrink to fewer than {least:,}; name a number between."
            )
