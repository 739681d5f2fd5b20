"""One round at a time: score, plan, resize, record. Free of any training framework."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation import named, replicas
from loralloc.allocation.blocks import modules_per_block
from loralloc.allocation.choices import (
    check_scores,
    is_gathered,
    measured_by,
    policy_of,
    tracker_of,
)
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import unexplained
from loralloc.allocation.importance.unexplained import Unexplained
from loralloc.allocation.layers import (
    active_adapter,
    experts_of,
    lora_config,
    lora_layers,
    rank_cost,
    ranks,
    weights_ab,
    weights_b,
)
from loralloc.allocation.module_rates import ModuleRates
from loralloc.allocation.new_rows import NewRows, rows_of
from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.optimizer_state import bare_optimizer, check_optimizer
from loralloc.allocation.policy import Limits, Plan, Policy, Scores
from loralloc.allocation.record import Record, Round
from loralloc.allocation.refusals import (
    CURE,
    ScoringError,
    check_counted,
    check_experts,
    check_finite,
    check_ranks,
    check_trains_and_is_saved,
    refuse_rounding,
    refuse_without_batch,
    refused,
)
from loralloc.allocation.resize import resize
from loralloc.allocation.schedule import Schedule
from loralloc.allocation.worth import num_known


class Allocator:
    """Moves ranks between the modules of a LoRA adapter.

    Call `step` where gradients are cleared, between two optimiser steps. A score that is gathered
    while training wants `learn` or `observe` at every optimiser step, until the last round. A
    `Trainer` user calls `loralloc.attach` instead, which does it all on schedule.

    Args:
        model: A PEFT model with a plain LoRA adapter, not wrapped for several processes.
        config: The options; of its schedule only `num_rounds` is read here.
        batches: The scoring batch B_val in micro-batches, as the model's forward takes them, with
            labels; none for a score that is gathered while training. Memory does not rise where
            they are no larger than training's.
        objective: The scoring batch with the loss on it, in the place of `batches`, where the loss
            is not the model's own. Without a scoring batch for a score that is gathered.
        adapter_name: PEFT's name of the adapter; the active one by default.
        policy: What decides the rounds, in the place of `config.policy`.
        schedule: Where the rounds are to take place, for their number and the record.
        record: Rounds of an earlier part of the same run, whose ranks the model already has.

    Raises:
        TypeError: The adapter has a part that rank allocation is not defined for.
        ValueError: The budget cannot give every module `min_rank` ranks, the batches do not fit
            the score, losses are too coarse for it, or a score or policy of one's own cannot be
            used.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AllocationConfig,
        batches: Sequence[Batch] = (),
        *,
        objective: Objective | None = None,
        adapter_name: str | None = None,
        policy: Policy | None = None,
        schedule: Schedule | None = None,
        record: Record | None = None,
    ) -> None:
        self.model = model
        self.config = config if policy is None else dataclasses.replace(config, policy=policy)
        self.adapter_name = adapter_name or active_adapter(model)
        self.num_rounds = len(schedule.steps) if schedule else config.num_rounds
        gathers = is_gathered(config)
        if gathers:
            has_batches = bool(batches or (objective and objective.batches))
            refuse_without_batch(self.config, has_batches=has_batches)
        self._policy = policy_of(self.config)
        self._measure = None if gathers else measured_by(config, self._policy)
        self._objective = objective or Objective(model, None if gathers else batches)
        layers = lora_layers(model, self.adapter_name)
        check_trains_and_is_saved(
            layers,
            lora_config(model, self.adapter_name),
            min_rank=config.min_rank,
            adapter_name=self.adapter_name,
        )
        check_experts(layers, self.config)
        start = ranks(layers, self.adapter_name)
        self.record = record or Record(
            config=self.config.as_data(),
            initial_ranks=start,
            round_steps=list(schedule.steps) if schedule else None,
            note=schedule.note if schedule else "",
        )
        check_ranks(self.record, start, min_rank=config.min_rank)
        self._rates = ModuleRates(
            model, self.record.initial_ranks, config.rank_lr_power, self.adapter_name
        )
        self._cost = (
            {name: rank_cost(layer) for name, layer in layers.items()}
            if config.budget == "parameters"
            else {}
        )
        self.num_pruned = num_pruned(model, config, self.record.initial_ranks)
        if config.score == "ablation":
            refuse_rounding(self._objective)
        self._tracker = (
            tracker_of(config, self._objective, self.adapter_name)
            if gathers and self._has_rounds_ahead
            else None
        )

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """Refuse an optimiser under which ranks cannot move; call it before the first step.

        The optimiser is tried on stand-ins of its parameters, and is as it was afterwards.

        Raises:
            ValueError: A LoRA weight that trains is not in it.
            TypeError: It keeps state of which it is not known how it follows a change of rank, or
                none that `new_state` could hand on.
        """
        config = self.config
        check_optimizer(
            optimizer,
            self._weights(),
            new_state=config.new_state,
            rank_lr_power=config.rank_lr_power,
        )

    def begin(self, optimizer: Optimizer | None) -> None:
        """Give modules their learning rates under this optimiser; call it before the first step.

        It is needed where `rank_lr_power` is not 0, and checks the optimiser in any case.

        Raises:
            ValueError: See `check_optimizer`.
            TypeError: See `check_optimizer`.
        """
        self.check_optimizer(optimizer)
        self._rates.follow(optimizer)

    def release(self) -> None:
        """Let the optimiser's steps be its own again; call it where training has ended."""
        self._rates.release()

    def learn(self, batches: Iterable[Batch]) -> None:
        """Let the gates of `score="architecture"` learn; nothing with another score.

        Call it before every step of the weights. The model stays in the mode it is in.

        Args:
            batches: What the gates learn from: training examples that the weights are not trained
                on until the last round, as many as the step has. Not read with another score.
        """
        if self._tracker:
            self._tracker.learn(batches)

    def observe(self) -> None:
        """Take a step's gradients into `score="sensitivity"`; nothing with another score.

        Call it after every step of the weights, before gradients are cleared. It sees the new
        weights, and the gradients as the optimiser saw them: of all accumulated batches, and
        clipped where they are.
        """
        if self._tracker:
            self._tracker.observe()

    @property
    def is_gathering(self) -> bool:
        """Whether the score is gathered while training, and rounds are to come."""
        return self._tracker is not None

    def finish(self) -> None:
        """Leave plain LoRA: gates go into B, and what was gathered for rounds to come is dropped.

        It happens by itself after the last round; call it where training ends before.
        """
        if self._tracker:
            self._tracker.finish()
        self._tracker = None

    def state(self) -> dict[str, Tensor]:
        """What was gathered for rounds to come, which a resumed run needs beside the record."""
        return self._tracker.state() if self._tracker else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: It is not of this score, or of other ranks.
        """
        if self._tracker:
            self._tracker.load_state(state)

    def step(self, optimizer: Optimizer | None, *, step: int = 0, epoch: float = 0.0) -> Round:
        """Carry out one round.

        Args:
            optimizer: The optimiser that trains the adapter.
            step: Optimiser steps so far, for the record.
            epoch: Epochs so far, for the record.

        Returns:
            What was done; also the last of `record.rounds`.

        Raises:
            ScoringError: A loss or score is not finite. Nothing was changed.
            RuntimeError: The score is gathered while training, and nothing was, or the last round
                was before; or `begin` was not called with this optimiser and had to be.
            ValueError: `newborns` goes by the steps that a rank has trained, and `step` does not
                tell them.
        """
        begin = time.perf_counter()
        self._rates.check_followed(optimizer)
        number, before = len(self.record.rounds) + 1, self.record.last_ranks
        limits = self._limits(number, step)
        scores = replicas.mean(self._scores(limits))
        check_finite(scores, number, step)
        generator = torch.Generator().manual_seed((self.config.seed or 0) * 1000 + number)
        try:
            scores, found = self._worth(scores, limits, generator)
            decided = replicas.agreed(self._policy(scores, limits))
            new_rows = self._rows(decided, found, generator)
        except FloatingPointError as error:
            raise ScoringError(f"{refused(number, step)}: {error}; {CURE}.") from error
        resize(
            self.model,
            decided,
            optimizer=optimizer,
            adapter_name=self.adapter_name,
            generator=generator,
            new_state=self.config.new_state,
            new_rows=new_rows,
        )
        weights = self._weights()
        # Rows of A that were drawn are the first process's.
        replicas.share([weights[n][0].data[-new:] for n, new in decided.added.items() if new])
        replicas.check_equal(replicas.by_part(weights), bare_optimizer(optimizer))
        if self._tracker:
            self._tracker.follow(decided, optimizer=optimizer)
        after = {name: decided.rank_after(name) if name in decided.kept else 0 for name in before}
        entry = Round(
            round=number,
            step=step,
            epoch=epoch,
            score=named.name_of(self.config.score),
            s_full=scores.s_full,
            s_base=scores.s_base,
            terms={name: _rounded(term) for name, term in scores.terms.items()},
            verified={name: list(indices) for name, indices in scores.verified.items()},
            settled=scores.settled,
            pruned={name: list(indices) for name, indices in decided.pruned.items() if indices},
            added={name: count for name, count in decided.added.items() if count},
            ranks_before=before,
            ranks_after=after,
            churn=self.record.churn(decided.pruned),
            lost=decided.lost,
            spare=decided.spare,
            seconds=round(time.perf_counter() - begin, 3),
            worth=_rounded(scores.worth),
        )
        self.record.rounds.append(entry)
        if not self._has_rounds_ahead:
            self.finish()
        return entry

    @property
    def _has_rounds_ahead(self) -> bool:
        return len(self.record.rounds) < self.num_rounds

    def _weights(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        layers = lora_layers(self.model, self.adapter_name)
        return weights_ab(layers, self.adapter_name)

    def _scores(self, limits: Limits) -> Scores:
        """Importance of every rank now, of this process alone."""
        layers = lora_layers(self.model, self.adapter_name)
        if self._tracker:
            scores = self._tracker.score()
        elif self._measure:
            scores = self._measure(self._objective, weights_b(layers, self.adapter_name), limits)
        else:
            raise RuntimeError(
                f"The {self.num_rounds} rounds of the allocation are over, and "
                f"{named.name_of(self.config.score)!r} is not gathered any more; give a larger "
                "`num_rounds`."
            )
        return check_scores(scores, ranks(layers, self.adapter_name), self.config)

    def _worth(
        self, scores: Scores, limits: Limits, generator: torch.Generator
    ) -> tuple[Scores, dict[str, Unexplained]]:
        """The scores with what next ranks are worth, where the policy reads it."""
        if self.config.policy != "worth":
            return scores, {}
        count = num_known(limits.num_pruned, len(scores.importance))
        found = self._unexplained(dict.fromkeys(scores.importance, count), generator)
        worth = {name: of.values for name, of in found.items()}
        return dataclasses.replace(scores, worth=worth), found

    def _rows(
        self, plan: Plan, found: dict[str, Unexplained], generator: torch.Generator
    ) -> dict[str, NewRows]:
        """The rows of A that new ranks begin with, where they are not drawn."""
        if self.config.new_rows != "gradient":
            return {}
        wanted = {name: count for name, count in plan.added.items() if count}
        return rows_of(plan, found or self._unexplained(wanted, generator))

    def _unexplained(
        self, wanted: Mapping[str, int], generator: torch.Generator
    ) -> dict[str, Unexplained]:
        layers, name = lora_layers(self.model, self.adapter_name), self.adapter_name
        return unexplained.measure(
            self._objective, layers, wanted, generator=generator, adapter_name=name
        )

    def _limits(self, number: int, step: int) -> Limits:
        config, births = self.config, self.record.births()
        young: Mapping[str, frozenset[int]] = {}
        if config.newborns != "compete":
            check_counted(config, self.record, step=step)
            young = self.record.young(step)
        spared = young if config.newborns == "protected" else {}
        return Limits(
            # Where budget was lost round after round, a last rank still stays.
            num_pruned=min(self.num_pruned, sum(map(len, births.values())) - 1),
            min_rank=config.min_rank,
            max_rank=config.max_rank,
            protected={
                name: spared.get(name, frozenset()).union(
                    i for i, b in enumerate(born) if b and number - b <= config.grace_rounds
                )
                for name, born in births.items()
            },
            young=young,
            cost=self._cost,
            experts=experts_of(lora_layers(self.model, self.adapter_name)),
            spare=self.record.spare,
        )


def num_pruned(model: nn.Module, config: AllocationConfig, initial_ranks: Mapping[str, int]) -> int:
    """Ranks pruned a round (n_A), with "block" and "model" counted on this model.

    Raises:
        ValueError: As many would be pruned as the adapter has.
    """
    if config.ranks_per_round == "model":
        count = len(initial_ranks)
    elif config.ranks_per_round == "block":
        count = modules_per_block(model, initial_ranks)
    else:
        count = int(config.ranks_per_round)
    total = sum(initial_ranks.values())
    if count >= total:
        raise ValueError(
            f"`ranks_per_round` of {config.ranks_per_round!r} prunes {count} ranks a round, but "
            f"the adapter has only {total}; lower it or raise the LoRA rank `r`."
        )
    return count


def _rounded(term: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Seven significant digits: what float32 holds, without the digits of float64."""
    return {name: [float(f"{v:.7g}") for v in x.tolist()] for name, x in term.items()}
