"""One round at a time: score, plan, resize, record. Free of any training framework."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.blocks import modules_per_block
from loralloc.allocation.config import TRACKED, AllocationConfig
from loralloc.allocation.importance import ablation, gradient, screened, shapley
from loralloc.allocation.importance.architecture import Gates
from loralloc.allocation.importance.sensitivity import Sensitivity
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import (
    lora_layers,
    rank_cost,
    ranks,
    weights_b,
)
from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.policy import Limits, Plan, Scores, plan
from loralloc.allocation.record import Record, Round
from loralloc.allocation.resize import resize

Score = Callable[[Objective, Mapping[str, Tensor], Limits], Scores]


class ScoringError(ArithmeticError):
    """Importance could not be measured; the model is as it was before the round."""


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
            they are no larger than training's; one example each under gradient checkpointing,
            which rests in evaluation mode.
        adapter_name: PEFT's name of the adapter.
        record: Rounds of an earlier part of the same run, whose ranks the model already has.

    Raises:
        TypeError: The adapter has a part that rank allocation is not defined for.
        ValueError: The budget cannot give every module `min_rank` ranks, or the batches do not fit
            the score.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AllocationConfig,
        batches: Sequence[Batch] = (),
        *,
        adapter_name: str = "default",
        record: Record | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.adapter_name = adapter_name
        is_tracked = config.score in TRACKED
        if is_tracked and batches:
            raise ValueError(
                f"`score` is {config.score!r}, which is gathered while the adapter trains, so that "
                "scoring batches would have no effect; leave them out."
            )
        self._objective = None if is_tracked else Objective(model, batches)
        layers = lora_layers(model, adapter_name)
        frozen = [
            name for name, b in weights_b(layers, adapter_name).items() if not b.requires_grad
        ]
        if frozen:
            raise ValueError(
                f"The LoRA weights of {frozen[0]} do not train, so ranks cannot be measured; load "
                "the adapter with `is_trainable=True`, or make it the active one."
            )
        start = ranks(layers, adapter_name)
        self.record = record or Record(config=dataclasses.asdict(config), initial_ranks=start)
        self._check_ranks(start)
        self._cost = (
            {name: rank_cost(layer) for name, layer in layers.items()}
            if config.budget == "parameters"
            else {}
        )
        self.num_pruned = num_pruned(model, config, self.record.initial_ranks)
        self._tracker = self._track() if self._has_rounds_ahead else None

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
                was before.
        """
        begin = time.perf_counter()
        number = len(self.record.rounds) + 1
        births = self.record.births()
        limits = self._limits(births, number)
        before = self.record.ranks
        layers = lora_layers(self.model, self.adapter_name)
        scores = self._scores(weights_b(layers, self.adapter_name), limits)
        _check_finite(scores, number, step)
        decided = plan(scores, limits)
        resize(
            self.model,
            decided,
            optimizer=optimizer,
            adapter_name=self.adapter_name,
            generator=torch.Generator().manual_seed((self.config.seed or 0) * 1000 + number),
        )
        if self._tracker:
            self._tracker.follow(decided, optimizer=optimizer)
        after = {name: decided.rank_after(name) if name in decided.kept else 0 for name in before}
        entry = Round(
            round=number,
            step=step,
            epoch=epoch,
            score=self.config.score,
            s_full=scores.s_full,
            s_base=scores.s_base,
            terms={name: _rounded(term) for name, term in scores.terms.items()},
            verified={name: list(indices) for name, indices in scores.verified.items()},
            settled=scores.settled,
            pruned={name: list(indices) for name, indices in decided.pruned.items()},
            added={name: count for name, count in decided.added.items() if count},
            ranks_before=before,
            ranks_after=after,
            churn=_churn(decided, births, number),
            lost=decided.lost,
            spare=decided.spare,
            seconds=round(time.perf_counter() - begin, 3),
        )
        self.record.rounds.append(entry)
        if not self._has_rounds_ahead:
            self.finish()
        return entry

    @property
    def _has_rounds_ahead(self) -> bool:
        return len(self.record.rounds) < self.config.num_rounds

    def _track(self) -> Tracker | None:
        """What gathers the score while training, where one does."""
        if self.config.score == "sensitivity":
            return Sensitivity(self.model, adapter_name=self.adapter_name)
        if self.config.score == "architecture":
            return Gates(
                self.model,
                lr=self.config.gate_lr,
                weight_decay=self.config.gate_weight_decay,
                adapter_name=self.adapter_name,
            )
        return None

    def _scores(self, weights_b: Mapping[str, Tensor], limits: Limits) -> Scores:
        if self._tracker:
            return self._tracker.score()
        if self._objective is None:
            raise RuntimeError(
                f"The {self.config.num_rounds} rounds of `num_rounds` are over, and "
                f"{self.config.score!r} is not gathered any more; give a larger `num_rounds`."
            )
        scores: dict[str, Score] = {
            "gradient": gradient.score,
            "ablation": ablation.score,
            "screened": functools.partial(screened.score, most=self.config.verify_ranks),
            "shapley": functools.partial(shapley.score, num_nodes=self.config.shapley_nodes),
        }
        return scores[self.config.score](self._objective, weights_b, limits)

    def _limits(self, births: Mapping[str, Sequence[int]], number: int) -> Limits:
        grace = self.config.grace_rounds
        return Limits(
            # Where budget was lost round after round, a last rank still stays.
            num_pruned=min(self.num_pruned, sum(map(len, births.values())) - 1),
            min_rank=self.config.min_rank,
            max_rank=self.config.max_rank,
            protected={
                name: frozenset(i for i, b in enumerate(born) if b and number - b <= grace)
                for name, born in births.items()
            },
            cost=self._cost,
            spare=self.record.spare,
        )

    def _check_ranks(self, now: Mapping[str, int]) -> None:
        """Refuse a budget that cannot be kept, and a record that is not this model's."""
        recorded = {name: rank for name, rank in self.record.ranks.items() if rank}
        if recorded != now:
            raise ValueError(
                "The model's ranks are not those of the record it is to continue; restore the "
                "adapter of the same checkpoint first."
            )
        total, least = sum(now.values()), self.config.min_rank
        short = [name for name, rank in now.items() if rank < least]
        if short and not self.record.rounds:
            raise ValueError(
                f"The budget is {total} ranks and {short[0]} has {now[short[0]]}, but `min_rank` "
                f"of {least} on {len(now)} modules needs {least * len(now)}; raise the LoRA rank "
                f"`r` to {least} or more, or lower `min_rank`."
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


def _check_finite(scores: Scores, number: int, step: int) -> None:
    """Refuse a round that would be planned on numbers that mean nothing."""
    if scores.is_finite():
        return
    bad = [name for name, x in scores.importance.items() if not bool(x.isfinite().all())]
    where = f" in {bad[0]} and {len(bad) - 1} more modules" if bad else ""
    losses = (
        ""
        if scores.s_full is None or scores.s_base is None
        else f"the loss on the scoring examples is {-scores.s_full:g} with the adapter and "
        f"{-scores.s_base:g} without, and "
    )
    raise ScoringError(
        f"Round {number} at step {step} was refused and the model left as it was: {losses}"
        f"importance is not finite{where}; lower the learning rate or check the data."
    )


def _churn(decided: Plan, births: Mapping[str, Sequence[int]], number: int) -> float | None:
    """Share of the ranks given in the last round that are pruned in this one."""
    young = sum(b == number - 1 for born in births.values() for b in born)
    if number == 1 or not young:
        return None
    gone = sum(
        births[name][i] == number - 1 for name, indices in decided.pruned.items() for i in indices
    )
    return gone / young


def _rounded(term: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Seven significant digits: what float32 holds, without the digits of float64."""
    return {name: [float(f"{v:.7g}") for v in x.tolist()] for name, x in term.items()}
