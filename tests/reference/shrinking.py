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


def sizes_by_look(losses: list[list[float]], tolerance: float | None) -> list[int]:
    """The number of the size after each look, from 0 where none was pruned.

    The first look compares with nothing and prunes nothing; the last is only to step back.

    Args:
        losses: At each look, the losses of examples of one target each, whatever the size.
        tolerance: By how much one may be worse or better and count as the same; None for a standard
            error.
    """
    size, lowest, kept, sizes = 0, losses[0], {0}, [0]
    for look, now in enumerate(losses[1:], start=1):
        worse, error = paired_difference([[x] for x in lowest], [[x] for x in now])
        same = error if tolerance is None else tolerance
        if worse > same and size not in kept:
            sizes += [size - 1] * (len(losses) - len(sizes))  # for good
            return sizes
        kept.add(size)
        if worse >= -same and look < len(losses) - 1:  # levelled off
            size += 1
        sizes.append(size)
        if sum(now) < sum(lowest):
            lowest = now
    return sizes
