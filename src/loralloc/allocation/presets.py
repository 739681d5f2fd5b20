"""Which options of an allocation each preset reads; what would have no effect is refused."""

from __future__ import annotations

from dataclasses import fields

from loralloc.allocation.config import AllocationConfig

SHRINK_ONLY = ("tolerance", "target_parameters", "prune_by", "prune_share", "judging_examples")
"""Options that nothing but "shrink" reads."""

SHRINK = (
    *SHRINK_ONLY,
    *("preset", "num_rounds", "rounds_at", "score", "scoring_examples"),
    *("shapley_nodes", "min_rank", "rank_lr_power", "seed"),
)
"""Options that "shrink" reads."""


def read_by(config: AllocationConfig) -> list[str]:
    """The options that a configuration's preset reads, in their order."""
    shrinks = config.preset == "shrink"
    names = [field.name for field in fields(config)]
    return [name for name in names if (name in SHRINK if shrinks else name not in SHRINK_ONLY)]


def check_read(config: AllocationConfig) -> None:
    """Refuse an option that the configuration's preset does not read.

    Raises:
        ValueError: One of them is other than by default.
    """
    read = read_by(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in read or value == field.default:
            continue
        if config.preset == "shrink":
            raise ValueError(
                f"`{field.name}` is {value!r}, which shrinking does not read: it prunes "
                "`prune_share` of the ranks in each of `num_rounds` rounds, or at `rounds_at`, and "
                "gives none; leave it out."
            )
        raise ValueError(
            f"`{field.name}` is {value!r}, which is read where an adapter is shrunk only; use "
            '`--method shrink` or `preset="shrink"`, or leave it out.'
        )
