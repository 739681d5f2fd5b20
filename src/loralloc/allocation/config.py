"""The options of an allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from loralloc.allocation import named

if TYPE_CHECKING:
    from loralloc.allocation.choices import Score
    from loralloc.allocation.importance.tracker import Tracker
    from loralloc.allocation.policy import Policy


SCORES = {
    name: f"loralloc.allocation.importance.{place}"
    for name, place in {
        "gradient": "gradient:score",
        "screened": "screened:score",
        "ablation": "ablation:score",
        "shapley": "shapley:score",
        "architecture": "architecture:Gates",
        "sensitivity": "sensitivity:Sensitivity",
        "norm": "norm:Norm",
        "random": "random:Random",
    }.items()
}
"""Our importance scores and where they are, the default first: a function that measures at a round
(see `allocation.choices.Score`), or a `Tracker` that gathers while the adapter trains."""

SCORE_OPTIONS = {
    "screened": {"most": "verify_ranks", "policy": "policy"},
    "shapley": {"num_nodes": "shapley_nodes"},
    "architecture": {"lr": "gate_lr", "weight_decay": "gate_weight_decay"},
    "random": {"seed": "seed"},
}
"""Further arguments of our scores, and the options below that they are taken from."""

POLICIES = {
    "paper": "loralloc.allocation.policy:plan",
    "inverse": "loralloc.allocation.inverse:plan_inverse",
    "worth": "loralloc.allocation.worth:plan",
}
"""Our policies and where they are."""

BUDGETS = ("ranks", "parameters")
"""What a budget can be counted in."""

NEWBORNS = ("compete", "protected", "potential")
"""What can become of ranks that are too young to be compared with the others."""

NEW_ROWS = ("kaiming", "gradient")
"""Where a new rank's row of A can come from."""

NEW_STATES = ("zero", "survivors")
"""What a new rank's part of the optimiser's state can begin with."""


@dataclass(frozen=True, kw_only=True)
class AllocationConfig:
    """How ranks move between modules while a LoRA adapter trains.

    The defaults are the paper's (Liu et al. 2024, section 4.3 and Appendix E), except for
    `score`, whose default reaches the paper's decision at a fraction of its cost.
    """

    num_rounds: int = 8
    """Rounds of scoring, pruning and giving (N_A), at most; at least 1. Source: the paper."""

    ranks_per_round: int | Literal["block", "model"] = "block"
    """Ranks pruned a round (n_A): a number, "block" (as many as a transformer block has adapted
    modules, 7 in LLaMA) or "model" (as many as the model has). Source: the paper, whose "1 * N_mod"
    is read as "block"."""

    warmup_epochs: float = 1.0
    """Epochs of training before the first round (K1); more than 0. Source: the paper. In a run
    that is too short for all rounds they are spread over its first 60% (see `place_rounds`)."""

    recovery_epochs: float = 0.25
    """Epochs of training between two rounds (K2); more than 0. Source: the paper."""

    rounds_at: tuple[int | float, ...] | None = None
    """Where the rounds take place, in the place of the three options above: shares of the run,
    between 0 and 1, or optimiser steps, from 1; ascending. None for the paper's places."""

    scoring_examples: int = 32
    """Held-out examples that importance is measured on (B_val), drawn once; all there are where
    there are fewer. Scores that are gathered while training need none. Source: the paper."""

    score: str | Score | type[Tracker] = "gradient"
    """How importance is measured: "gradient" is eq. 6 to first order (two backward passes for all
    ranks), "ablation" is eq. 6 exactly, "screened" ranks by gradient and settles the ranks near
    the cut by ablation, "shapley" divides the whole improvement among the ranks. "architecture"
    (ALoRA-DNAS) learns a gate on every rank from half of the training examples, while until the
    last round the weights learn from the other half alone; "sensitivity" (ALoRA-Sensi) averages
    AdaLoRA's |w dL/dw| over the training steps. Controls: "norm" is |A_i| |B_i|, "random" draws.
    Your own (see `allocation.choices.Score`, `Tracker`): itself or "package.module:name"."""

    verify_ranks: int = 64
    """Most ranks a round may check by ablation when `score` is "screened"; fewer than 16 are too
    few to trust, so that then none is checked."""

    shapley_nodes: int = 5
    """Backward passes of a round when `score` is "shapley", at least 1; they are doubled where the
    shares would miss the whole by more than 1%."""

    gate_lr: float = 3e-4
    """Learning rate of the gates' Adam when `score` is "architecture"; more than 0. Source: DARTS
    (Liu et al. 2019). A gate moves by about this much a step, so short runs may want 1e-2."""

    gate_weight_decay: float = 1e-3
    """Weight decay of the gates' Adam when `score` is "architecture"; it draws them towards 1.
    Source: DARTS."""

    min_rank: int = 0
    """Rank below which no module is pruned; 0 lets a module leave the adapter, as in the
    paper."""

    max_rank: int | None = None
    """Rank above which no module receives; None for no limit. Source: the paper has none."""

    grace_rounds: int = 0
    """Rounds during which a newly given rank cannot be pruned; 0 is the paper's reading."""

    newborns: Literal["compete", "protected", "potential"] = "compete"
    """What becomes at a round of the ranks that are young: those that have trained for fewer steps
    than the first ranks had at the first round. "compete" compares them with all others, as the
    paper does; "protected" prunes none of them; "potential" adds to their scores what they could
    still do (see `importance.potential`), for one backward pass more a round."""

    new_state: Literal["zero", "survivors"] = "zero"
    """What a new rank begins with in the optimiser's state: "zero", as in the paper, or "survivors"
    for what decides how large an update is (Adam's `exp_avg_sq`, and its like in other optimisers,
    in 8 bits too): the mean over the ranks of its module that stay."""

    new_rows: Literal["kaiming", "gradient"] = "kaiming"
    """What a new rank reads, its row of A: "kaiming" is drawn, as in the paper; "gradient" is the
    largest direction of dL/dW on the scoring batch that the module's rows do not explain, and
    orthogonal to them, for four backward passes more a round."""

    rank_lr_power: float = 0.0
    """p of a module's learning rate lr (r0 / r_m)^p, with r0 its rank before the first round and
    r_m its rank now; 0, as in the paper, for one rate. With the scaling frozen, a module that grew
    takes larger steps in function space."""

    policy: str | Policy = "paper"
    """Who is pruned and who receives: "paper" prunes the lowest scores of one pool and gives to
    the modules that lost nothing; "worth" prunes the same and gives where the next rank is worth
    most a unit of the budget, by the largest unexplained singular values of dL/dW on the scoring
    batch, for four backward passes more a round; "inverse", a control, is the paper's with the
    scores turned round. Your own, a function from `Scores` and `Limits` to a `Plan`, is given
    itself or as "package.module:name"."""

    budget: Literal["ranks", "parameters"] = "ranks"
    """What is held constant: the number of ranks (the paper) or of LoRA parameters. A rank of a
    feed-forward module costs more parameters than one of an attention module."""

    seed: int | None = None
    """Seed of the scoring examples and of new ranks; None takes the run's seed (0 outside a
    Trainer)."""

    preset: Literal["paper", "shrink"] = "paper"
    """What the rounds are for: "paper" moves ranks between modules; "shrink" gives none, and looks
    for the smallest adapter whose held-out loss is not worse (see `methods.shrink`). `allocation.
    presets` says which options each reads; the others are refused."""

    tolerance: float | None = None
    """What the rounds of "shrink" may cost together of held-out loss: in its units, a target; from
    0. None for a hundredth of it, or in each round one standard error, where that is more."""

    target_parameters: int | None = None
    """Parameters to shrink to, whatever the loss, in the place of `tolerance`; at least 1."""

    prune_by: str = "singular-values"
    """What "shrink" prunes by: "singular-values", for which every module takes its singular form
    before a round, in which it computes the same and the ranks share nothing, or "scores", for the
    ranks as they are trained by `score`."""

    prune_share: float = 0.3
    """Share of the ranks that a round of "shrink" prunes; between 0 and 1. Chosen, not measured: 8
    rounds, of which the first only looks, leave a twelfth."""

    judging_examples: int = 256
    """Held-out examples on which sizes are compared with "shrink", beside those that importance is
    measured on; all there are where there are fewer."""

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        _at_least("num_rounds", self.num_rounds, 1)
        _at_least("scoring_examples", self.scoring_examples, 1)
        _at_least("verify_ranks", self.verify_ranks, 0)
        _at_least("shapley_nodes", self.shapley_nodes, 1)
        _at_least("min_rank", self.min_rank, 0)
        _at_least("grace_rounds", self.grace_rounds, 0)
        named.check("score", self.score, SCORES)
        named.check("policy", self.policy, POLICIES)
        _one_of("budget", self.budget, BUDGETS)
        _one_of("newborns", self.newborns, NEWBORNS)
        _one_of("new_state", self.new_state, NEW_STATES)
        _one_of("new_rows", self.new_rows, NEW_ROWS)
        if isinstance(self.ranks_per_round, str):
            _one_of("ranks_per_round", self.ranks_per_round, ("block", "model"), "or a number")
        else:
            _at_least("ranks_per_round", self.ranks_per_round, 1)
        for name in ("warmup_epochs", "recovery_epochs"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; it must be a number of epochs above 0."
                )
        if not _is_positive(self.gate_lr):
            raise ValueError(f"`gate_lr` is {self.gate_lr!r}; it must be a number above 0.")
        for name in ("gate_weight_decay", "rank_lr_power"):
            value = getattr(self, name)
            if value != 0 and not _is_positive(value):
                raise ValueError(f"`{name}` is {value!r}; it must be a number from 0.")
        if self.max_rank is not None:
            _at_least("max_rank", self.max_rank, max(1, self.min_rank))
        if self.seed is not None:
            _at_least("seed", self.seed, 0)
        if self.rounds_at is not None:
            self._take_places(self.rounds_at)
        self._check_shrinking()

    def as_data(self) -> dict[str, Any]:
        """The options as JSON has them, a score or policy of one's own by its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "rounds_at": None if self.rounds_at is None else list(self.rounds_at),
            "score": named.name_of(self.score),
            "policy": named.name_of(self.policy),
        }

    def _check_shrinking(self) -> None:
        _one_of("preset", self.preset, ("paper", "shrink"))
        _one_of("prune_by", self.prune_by, ("singular-values", "scores"))
        _at_least("judging_examples", self.judging_examples, 2)
        if not (_is_positive(self.prune_share) and self.prune_share < 1):
            raise ValueError(
                f"`prune_share` is {self.prune_share!r}; it must be a share of the ranks, between "
                "0 and 1."
            )
        if self.target_parameters is not None:
            _at_least("target_parameters", self.target_parameters, 1)
        tolerance = self.tolerance
        if tolerance is not None and tolerance != 0 and not _is_positive(tolerance):
            raise ValueError(f"`tolerance` is {tolerance!r}; it must be a loss of at least 0.")
        if tolerance is not None and self.target_parameters is not None:
            raise ValueError(
                f"`tolerance` is {tolerance} and `target_parameters` {self.target_parameters}, but "
                "a target is reached whatever the loss; leave out one of the two."
            )

    def _take_places(self, places: Any) -> None:
        """Check `rounds_at`, and let `num_rounds` be the number of its places."""
        is_list = isinstance(places, (list, tuple)) and len(places) > 0
        in_steps = is_list and all(type(place) is int and place >= 1 for place in places)
        in_shares = is_list and all(type(place) is float and 0 < place < 1 for place in places)
        if not (in_steps or in_shares) or sorted(set(places)) != list(places):
            raise ValueError(
                f"`rounds_at` is {places!r}; give a list in ascending order, either of shares of "
                "the run between 0 and 1, as [0.1, 0.3], or of optimiser steps, as [20, 60]."
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("num_rounds", "warmup_epochs", "recovery_epochs"):
            value = getattr(self, name)
            if value not in (defaults[name], len(places) if name == "num_rounds" else None):
                raise ValueError(
                    f"`{name}` is {value}, but `rounds_at` says where the {len(places)} rounds "
                    "take place; leave out one of the two."
                )
        # Frozen for users; here the two fields are brought into one form.
        object.__setattr__(self, "rounds_at", tuple(places))
        object.__setattr__(self, "num_rounds", len(places))


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value is not True and 0 < value < math.inf


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {least}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...], more: str = "") -> None:
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(
            f"`{name}` is {value!r}; use one of {choices} {more}".rstrip() + f".{hint}"
        )
