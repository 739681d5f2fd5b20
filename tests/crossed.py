"""Cases of a test with several parameters."""

import itertools

import pytest


def crossed(*parameters):
    """Every combination; `slow` where each value stands in another one too.

    Those that are not are as many as the longest parameter has values: 4 of 4 × 4, 6 of 6 × 3.
    """
    longest = max(map(len, parameters))
    kept = {tuple(at % len(values) for values in parameters) for at in range(longest)}
    return [
        pytest.param(
            *(values[index] for values, index in zip(parameters, place, strict=True)),
            marks=[] if place in kept else [pytest.mark.slow],
        )
        for place in itertools.product(*(range(len(values)) for values in parameters))
    ]
