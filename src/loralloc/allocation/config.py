"""The options of an allocation, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

SCORES = ("gradient", "screened", "ablation", "shapley", "architecture", "sensitivity")
"""Names of the importance scores, the default first."""

TRACKED = ("architecture", "sensitivity")
"""Scores that are gathered while the adapter trains; no scoring batch is read."""

BUDGETS = ("ranks", "parameters")
"""What a budget can be counted in."""


@dataclass(frozen=True, kw_only=True)
class AllocationConfig:
    """How ranks move between modules while a LoRA adapter trains.

    The defaults are the paper's (Liu et al. 2024, section 4.3 and Appendix E), except for
    `score`, whose default reaches the paper's decision at a fraction of its cost.
    """

    num_rounds: int = 8
    """Rounds of scoring, pruning and giving (N_A); at least 1. Source: the paper."""

    ranks_per_round: int | Literal["block", "model"] = "block"
    """Ranks pruned a round (n_A): a number, "block" (as many as a transformer block has adapted
    modules, 7 in LLaMA) or "model" (as many as the model has). Source: the paper, whose "1 * N_mod"
    is read as "block"."""

    warmup_epochs: float = 1.0
    """Epochs of training before the first round (K1); more than 0. Source: the paper."""

    recovery_epochs: float = 0.25
    """Epochs of training between two rounds (K2); more than 0. Source: the paper."""

    scoring_examples: int = 32
    """Held-out examples that importance is measured on (B_val), drawn once; "architecture" and
    "sensitivity" need none. Source: the paper."""

    score: Literal["gradient", "screened", "ablation", "shapley", "architecture", "sensitivity"] = (
        "gradient"
    )
    """How importance is measured: "gradient" is eq. 6 to first order (two backward passes for all
    ranks), "ablation" is eq. 6 exactly, "screened" ranks by gradient and settles the ranks near
    the cut by ablation, "shapley" divides the whole improvement among the ranks. "architecture"
    (ALoRA-DNAS) learns a gate on every rank from half of the training examples, while until the
    last round the weights learn from the other half alone; "sensitivity" (ALoRA-Sensi) averages
    AdaLoRA's |w dL/dw| over the training steps."""

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

    budget: Literal["ranks", "parameters"] = "ranks"
    """What is held constant: the number of ranks (the paper) or of LoRA parameters. A rank of a
    feed-forward module costs more parameters than one of an attention module."""

    seed: int | None = None
    """Seed of the scoring examples and of new ranks; None takes the run's seed (0 outside a
    Trainer)."""

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        _at_least("num_rounds", self.num_rounds, 1)
        _at_least("scoring_examples", self.scoring_examples, 1)
        _at_least("verify_ranks", self.verify_ranks, 0)
        _at_least("shapley_nodes", self.shapley_nodes, 1)
        _at_least("min_rank", self.min_rank, 0)
        _at_least("grace_rounds", self.grace_rounds, 0)
        _one_of("score", self.score, SCORES)
        _one_of("budget", self.budget, BUDGETS)
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
        if self.gate_weight_decay != 0 and not _is_positive(self.gate_weight_decay):
            raise ValueError(
                f"`gate_weight_decay` is {self.gate_weight_decay!r}; it must be a number from 0."
            )
        if self.max_rank is not None:
            _at_least("max_rank", self.max_rank, max(1, self.min_rank))
        if self.seed is not None:
            _at_least("seed", self.seed, 0)


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
