"""Paired tests, term by term."""

import itertools
import math

from scipy import stats


def sign_flip(differences):
    """The share of all ways to choose signs whose mean is as far from 0 as the one found."""
    found = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= found - 1e-9 for total in sums) / len(sums)


def paired_t(differences):
    """Student's t of the mean difference, and twice the tail beyond it."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    t = mean / math.sqrt(variance / n)
    return 2 * float(stats.t.sf(abs(t), n - 1))
