"""Which size of a shrinking adapter is kept, one example and one size at a time."""

import math


def paired_difference(before: list[list[float]], after: list[list[float]]) -> tuple[float, float]:
    """Difference of the mean losses over all targets, and its standard error.

    Args:
        before: The losses of each example's targets under the first model.
        after: The same under the second.
    """
    num_targets = sum(len(targets) for targets in before)
    difference = 0.0
    for first, second in zip(before, after, strict=True):
        for a, b in zip(first, second, strict=True):
            difference += (b - a) / num_targets
    # What an example's difference is beyond what its number of targets lets expect.
    squares, num_examples = 0.0, len(before)
    for first, second in zip(before, after, strict=True):
        squares += (sum(second) - sum(first) - difference * len(first)) ** 2
    variance = num_examples / (num_examples - 1) * squares / num_targets**2
    return difference, math.sqrt(variance)


def last_kept(losses: list[list[float]], tolerance: float | None) -> int:
    """The number of the size that is kept, of sizes tried in order until one is worse.

    Args:
        losses: Of each size, the losses of examples of one target each.
        tolerance: By how much one may be worse than the best before; None for a standard error.
    """
    best = 0
    for size in range(1, len(losses)):
        worse, error = paired_difference(
            [[loss] for loss in losses[best]], [[loss] for loss in losses[size]]
        )
        if worse > (error if tolerance is None else tolerance):
            return size - 1
        if sum(losses[size]) < sum(losses[best]):
            best = size
    return len(losses) - 1
