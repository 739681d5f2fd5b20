"""What a round, or an allocation, is refused for, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from loralloc.allocation import named
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import has_own_bias, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Scores
from loralloc.allocation.record import Record

NOT_ON_PARAMETERS = {
    "score": dict.fromkeys(("ablation", "screened", "architecture"), "'gradient' or 'shapley'"),
    "policy": {"worth": "'paper'"},
    "new_rows": {"gradient": "'kaiming'"},
}
"""Options with values that cannot be where PEFT adapts parameters, and what to use there."""

CURE = "lower the learning rate or check the data"


class ScoringError(ArithmeticError):
    """Importance could not be measured; the model is as it was before the round."""


def refuse_without_batch(config: AllocationConfig, *, has_batches: bool) -> None:
    """Refuse a scoring batch, and what is measured on it, beside a score that reads none."""
    if has_batches:
        raise ValueError(
            f"`score` is {named.name_of(config.score)!r}, which is gathered while the adapter "
            "trains, so that scoring batches would have no effect; leave them out."
        )
    for option, value in (
        ("newborns", "potential"),
        ("new_rows", "gradient"),
        ("policy", "worth"),
    ):
        if getattr(config, option) == value:
            raise ValueError(
                f"`{option}` is {value!r}, which is measured on the scoring batch, but `score` is "
                f"{named.name_of(config.score)!r}, which is gathered while the adapter trains and "
                f"reads none; leave `{option}` out or use another score."
            )


def refuse_rounding(objective: Objective) -> None:
    """Refuse to tell ranks apart by losses that are rounded more coarsely than a rank changes them.

    Raises:
        ValueError: They are.
    """
    if objective.rounding:
        raise ValueError(
            f"`score` is 'ablation', but the model computes in {str(objective.rounding)[6:]}, "
            "whose rounding hides what one rank changes in the loss; use 'gradient' or 'screened', "
            "or float32 weights."
        )


def check_finite(scores: Scores, number: int, step: int) -> None:
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
    raise ScoringError(f"{refused(number, step)}: {losses}importance is not finite{where}; {CURE}.")


def refused(number: int, step: int) -> str:
    """How the message of a `ScoringError` begins."""
    return f"Round {number} at step {step} was refused and the model left as it was"


def check_experts(layers: Mapping[str, LoraLayer], config: AllocationConfig) -> None:
    """Refuse what is not defined where a rank is one of every expert, of one parameter.

    Raises:
        ValueError: Naming the option, and a parameter.
    """
    wrapped = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    for option, values in NOT_ON_PARAMETERS.items():
        value = named.name_of(getattr(config, option))
        if wrapped and value in values:
            raise ValueError(
                f"`{option}` is {value!r}, which reads what a linear layer is given and gives, and "
                f"the adapter is on the parameter {wrapped[0]} too, to which nothing is given; use "
                f"{values[value]}, or leave `target_parameters` out of the adapter."
            )


def check_counted(config: AllocationConfig, record: Record, *, step: int) -> None:
    """Refuse a round whose ranks have no age."""
    number = len(record.rounds) + 1
    last = record.rounds[-1].step if record.rounds else 0
    if step <= last:
        before = f"round {number - 1} was at step {last}" if record.rounds else "none is"
        raise ValueError(
            f"`newborns` is {config.newborns!r}, which goes by the steps that a rank has "
            f"trained, but round {number} is said to be at step {step} and {before}; pass the "
            "optimiser steps so far as `step=`."
        )


def check_trains_and_is_saved(
    layers: Mapping[str, LoraLayer], options: LoraConfig, *, min_rank: int, adapter_name: str
) -> None:
    """Refuse an adapter that stands still, and one whose emptied modules would lose a bias."""
    for name, b in weights_b(layers, adapter_name).items():
        if not b.requires_grad:
            raise ValueError(
                f"The LoRA weights of {name} do not train, so ranks cannot be measured; load "
                "the adapter with `is_trainable=True`, or make it the active one."
            )
    biased = [name for name, layer in layers.items() if has_own_bias(layer, options)]
    if biased and min_rank < 1:
        raise ValueError(
            "The adapter has `bias='lora_only'`, with which PEFT saves the bias of "
            f"{biased[0]} beside its ranks only, so that it would be lost with the last of "
            "them; set `min_rank=1`, or train with `bias='none'`."
        )


def check_ranks(record: Record, now: Mapping[str, int], *, min_rank: int) -> None:
    """Refuse a budget that cannot be kept, and a record that is not this model's."""
    recorded = {name: rank for name, rank in record.ranks.items() if rank}
    if recorded != now:
        raise ValueError(
            "The model's ranks are not those of the record it is to continue; restore the "
            "adapter of the same checkpoint first."
        )
    total, least = sum(now.values()), min_rank
    short = [name for name, rank in now.items() if rank < least]
    if short and not record.rounds:
        raise ValueError(
            f"The budget is {total} ranks and {short[0]} has {now[short[0]]}, but `min_rank` "
            f"of {least} on {len(now)} modules needs {least * len(now)}; raise the LoRA rank "
            f"`r` to {least} or more, or lower `min_rank`."
        )
