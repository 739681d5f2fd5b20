"""How sure a difference is: intervals, paired tests, and the LoRA rank that would do the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 9_999
"""Of a permutation test; 9,999 resolve a p-value of 0.0001."""

ROUNDING = 1e-12
"""A spread below this share of a difference is that of its arithmetic."""

SIGNIFICANT = 0.05
"""The p-value below which a difference is more than noise."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One measure over all seeds."""

    values: tuple[float, ...]
    """One a seed."""

    median: float
    """What the paper reports."""

    mean: float
    interval: tuple[float, float] | None
    """The mean's, of 95% by Student's t over seeds; None for one seed alone. A bootstrap of three
    values is little more than their range, which holds the mean in three cases of four."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two methods with the same seeds on the same examples."""

    difference: float
    """Mean of the first less mean of the second."""

    half_width: float | None
    """Half of the difference's 95% interval, by Student's t over seeds: differences much smaller
    could not have been told. None for one seed alone."""

    p_seeds: float | None
    """Of a paired t-test over seeds; None where there are fewer than two."""

    p_examples: float | None
    """Of a paired permutation test over examples, each averaged over seeds; None where examples
    have no measure of their own."""

    num_seeds: int
    num_examples: int

    @property
    def is_noise(self) -> bool:
        """Whether the difference may be chance: of the seeds, or of the examples.

        Where one of the two cannot be told the other decides alone only for examples: one seed
        says nothing of the next, so that its difference always may be.
        """
        if self.p_seeds is None or self.p_seeds >= SIGNIFICANT:
            return True
        return self.p_examples is not None and self.p_examples >= SIGNIFICANT


def spread(values: Sequence[float]) -> Spread:
    """Median, mean and interval of one measure over seeds.

    Args:
        values: One a seed, at least one.
    """
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        interval = (mean - half, mean + half)
    return Spread(
        values=tuple(values),
        median=float(statistics.median(values)),
        mean=mean,
        interval=interval,
    )


def compare(
    first: Mapping[int, float],
    second: Mapping[int, float],
    *,
    examples: tuple[Mapping[int, Sequence[float]], Mapping[int, Sequence[float]]] | None = None,
) -> Comparison | None:
    """Compare two methods on the seeds that both have.

    Args:
        first: The measure of one, by seed.
        second: The measure of the other.
        examples: The measure of every example, by seed, of both.

    Returns:
        None where they have no seed in common.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    ours = np.array([first[seed] for seed in seeds])
    theirs = np.array([second[seed] for seed in seeds])
    gaps = np.zeros(0)
    if examples is not None:
        one, other = (
            np.mean([np.asarray(of[seed], dtype=float) for seed in seeds], axis=0)
            for of in examples
        )
        gaps = one - other
    interval = spread((ours - theirs).tolist()).interval
    return Comparison(
        difference=float(np.mean(ours - theirs)),
        half_width=None if interval is None else (interval[1] - interval[0]) / 2,
        p_seeds=paired_t(ours - theirs),
        p_examples=sign_flip(gaps) if len(gaps) else None,
        num_seeds=len(seeds),
        num_examples=len(gaps),
    )


def paired_t(differences: np.ndarray) -> float | None:
    """The two-sided p-value of Student's paired t-test; None for fewer than two differences."""
    if len(differences) < 2:
        return None
    if np.ptp(differences) <= ROUNDING * np.abs(differences).max():
        # Without a spread the statistic is 0 / 0, or beyond all bounds.
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip(differences: np.ndarray) -> float:
    """The two-sided p-value of the mean of paired differences, when each may have either sign.

    Exact for few differences; by `NUM_RESAMPLES` draws of signs, always the same, for many.
    """
    told = differences[differences != 0]  # equal pairs stay equal whichever way they are put
    if len(told) < 2:  # a single one is as far from 0 with either sign
        return 1.0
    result = stats.permutation_test(
        (told,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 2**22 // len(told)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def equivalent_rank(loss: float, ladder: Mapping[int, float]) -> str:
    """The rank at which LoRA, tuned likewise, has the same loss.

    LoRA's losses are made to fall with the rank (isotonic regression), and ranks between those of
    the ladder are interpolated in their logarithm.

    Args:
        loss: A method's.
        ladder: LoRA's, by rank; at least two.

    Returns:
        A number, "under 4" or "over 32" where the ladder does not reach; as in "6.3".
    """
    ranks = sorted(ladder)
    assert len(ranks) > 1, "one rank has nothing to interpolate between"
    fallen = optimize.isotonic_regression([ladder[rank] for rank in ranks], increasing=False).x
    # Rounded: a mean of equal losses is not always that loss to the last bit.
    losses, loss = [round(float(value), 12) for value in fallen], round(loss, 12)
    if loss > losses[0]:
        return f"under {ranks[0]}"
    if loss < losses[-1]:
        return f"over {ranks[-1]}"
    # Losses rise from the last rank to the first, as `np.interp` wants them. Of ranks with equal
    # losses the smallest counts.
    backwards = zip(reversed(losses), reversed(ranks), strict=True)
    rising = {at: math.log2(rank) for at, rank in backwards}
    return f"{2 ** float(np.interp(loss, list(rising), list(rising.values()))):.2g}"
