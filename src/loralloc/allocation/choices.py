"""The score and the policy that a configuration asks for: ours by name, or a user's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from loralloc.allocation import named
from loralloc.allocation.config import POLICIES, SCORE_OPTIONS, SCORES, AllocationConfig
from loralloc.allocation.importance import gradient, potential
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Plan, Policy, Scores


class Score(Protocol):
    """A score that is measured at a round: a function with this signature, ours or your own."""

    def __call__(
        self, objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits, /
    ) -> Scores:
        """Importance of every rank; the model must be afterwards as it was, bit for bit.

        Args:
            objective: The held-out batches (`objective.batches`), the adapted model and its losses
                on them (`objective.losses(batch)`, `objective.mean_loss()`), to be taken within
                `objective.evaluating()`; and what they are rounded to (`objective.rounding`).
            weights_b: B_m by module, shape (out_features, num_ranks), the model's own parameters in
                model order; a gate of rank r multiplies column r.
            limits: What the round may prune; and `limits.experts`, the modules of which a rank is a
                column for each of E experts, so that B is of shape (out_features, num_ranks E).

        Returns:
            For each term a tensor of shape (num_ranks,) for every module of `weights_b`, finite; a
            rank's importance is the sum of its terms, and the lowest are pruned.
        """


def is_gathered(config: AllocationConfig) -> bool:
    """Whether the score is gathered while the adapter trains, so that no scoring batch is read.

    Raises:
        ValueError: `score` cannot be imported, or is neither a `Score` nor a `Tracker`.
    """
    return _is_tracker(_found(config))


def learns_from_batches(config: AllocationConfig) -> bool:
    """Whether the score is learned from training examples that the weights do not train on."""
    found = _found(config)
    return _is_tracker(found) and named.bare(found).learn is not Tracker.learn


def measured_by(config: AllocationConfig, policy: Policy) -> Score:
    """The function that measures a configuration's score at a round, with its options.

    Args:
        config: Of a score that is not gathered.
        policy: What will decide on the scores.
    """
    measure = functools.partial(_found(config), **_options(config, policy))
    if config.newborns != "potential":
        return cast(Score, measure)
    if named.name_of(config.score) == "screened":  # where the cut is depends on the potential
        ranked = functools.partial(potential.score, measure=gradient.score)
        return cast(Score, functools.partial(measure, first_order=ranked))

    def checked(objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits) -> Scores:
        num_ranks = {
            name: b.shape[1] // limits.experts.get(name, 1) for name, b in weights_b.items()
        }
        return check_scores(measure(objective, weights_b, limits), num_ranks, config)

    return cast(Score, functools.partial(potential.score, measure=checked))


def tracker_of(config: AllocationConfig, objective: Objective, adapter_name: str) -> Tracker:
    """What gathers a configuration's score while the adapter trains.

    Args:
        config: Of a score that is gathered.
        objective: The loss of the run, of a PEFT model with a plain LoRA adapter.
        adapter_name: PEFT's name of the adapter.
    """
    options = _options(config)
    tracker: Tracker = _found(config)(objective.model, adapter_name=adapter_name, **options)
    tracker.objective = objective
    return tracker


def check_scores(scores: Any, num_ranks: Mapping[str, int], config: AllocationConfig) -> Scores:
    """What a score gave, if a round can be planned on it but for its numbers.

    Args:
        scores: What it gave.
        num_ranks: The rank of every module, in model order.
        config: Of the score.

    Raises:
        ValueError: It is no `Scores`, or not of these ranks.
    """
    name = named.name_of(config.score)
    if not isinstance(scores, Scores):
        raise ValueError(f"The score {name!r} gave a {type(scores).__name__}; give a `Scores`.")
    scores.check(num_ranks, name=name)
    return scores


def policy_of(config: AllocationConfig) -> Policy:
    """A configuration's policy, whose plans are looked at before they are carried out.

    Raises:
        ValueError: `policy` cannot be imported or called, or the preset has none; the policy
            returned raises it where a plan cannot be carried out.
    """
    if config.preset == "shrink" and config.policy == "paper":
        raise ValueError(
            '`preset` is "shrink", which judges every size, and a round by itself '
            "does not; call attach(), or use `--method shrink`."
        )
    name = named.name_of(config.policy)
    found: Policy = named.load("policy", config.policy, POLICIES)
    named.check_takes("policy", found, "(scores, limits)", [None] * 2)

    def decide(scores: Scores, limits: Limits) -> Plan:
        plan: Any = found(scores, limits)
        if not isinstance(plan, Plan):
            raise ValueError(f"The policy {name!r} gave a {type(plan).__name__}; give a `Plan`.")
        plan.check({module: len(x) for module, x in scores.importance.items()}, name=name)
        return plan

    return decide


def _options(config: AllocationConfig, policy: Policy | None = None) -> dict[str, Any]:
    """The further arguments of one of our scores."""
    taken = SCORE_OPTIONS.get(named.name_of(config.score), {})
    return {
        argument: policy if option == "policy" else getattr(config, option)
        for argument, option in taken.items()
    }


def _is_tracker(found: Any) -> bool:
    kind = named.bare(found)
    return isinstance(kind, type) and issubclass(kind, Tracker)


def _found(config: AllocationConfig) -> Any:
    """The function or class, if it can be called as scores are."""
    found, name = named.load("score", config.score, SCORES), named.name_of(config.score)
    further: dict[str, Any] = dict.fromkeys(SCORE_OPTIONS.get(name, {}))
    if _is_tracker(found):
        missing = sorted(getattr(named.bare(found), "__abstractmethods__", ()))
        if missing:
            raise ValueError(
                f"`score` is {name!r}, a Tracker without {' and '.join(missing)}; define what is "
                "missing."
            )
        further["adapter_name"] = "default"
        named.check_takes("score", found, "(model, adapter_name=...)", [None], further)
    elif isinstance(named.bare(found), type):
        raise ValueError(
            f"`score` is {name!r}, a class but no Tracker; give a function that takes "
            "(objective, weights_b, limits) and returns Scores, or a subclass of Tracker."
        )
    else:
        named.check_takes("score", found, "(objective, weights_b, limits)", [None] * 3, further)
    return found
