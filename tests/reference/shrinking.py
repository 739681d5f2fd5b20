"""What may go of an adapter, one example and one rank at a time."""

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


def num_pruned(
    before: list[float], after: dict[int, list[float]], counts: list[int], tolerance: float | None
) -> int:
    """How many of the lowest ranks go in a round, the first of the counts that costs nothing.

    Args:
        before: The losses of examples of one target each, before.
        after: The same without so many ranks, by their number.
        counts: The numbers that are tried, in order.
        tolerance: What may be lost; None for a standard error or a hundredth of the loss.
    """
    for count in counts:
        cost, error = paired_difference([[x] for x in before], [[x] for x in after[count]])
        allowed = tolerance
        if allowed is None:
            allowed = max(error, 0.01 * sum(before) / len(before))
        if cost <= allowed:
            return count
    return 0
