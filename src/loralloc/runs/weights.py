"""What a checkpoint has to hold: every weight of the model, but for a head that is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POOLER = "pooler"
"""What some encoders read a text's first token with: a checkpoint of masked language modelling has
none, so that it is a part of a new head."""

MOST_NAMED = 4
"""Weights that a message names."""


def check_weights(
    name: str, model: Any, loading: Mapping[str, Any], *, head_is_new: bool
) -> list[str]:
    """Refuse a model whose weights are not all its checkpoint's: the others are drawn at random.

    Args:
        name: What the user calls the model.
        model: The model, loaded.
        loading: What `from_pretrained` says of it: `missing_keys` and `mismatched_keys`.
        head_is_new: Whether the weights behind the backbone may be missing.

    Returns:
        The modules of the head that are new.

    Raises:
        ValueError: A weight is missing or has another shape.
    """
    inside = f"{model.base_model_prefix}."
    missing = sorted(loading["missing_keys"])
    new = [key for key in missing if not key.startswith(inside) or POOLER in key.split(".")]
    lost = [key for key in missing if not head_is_new or key not in new]
    if lost:
        raise ValueError(
            f"{name} lacks weights of a {type(model).__name__}, which would stay as they are drawn "
            f"at random: {_named(lost)}; use a checkpoint that was saved with them."
        )
    if loading["mismatched_keys"]:
        shapes = [
            f"{key} is {tuple(found)} and not {tuple(wanted)}"
            for key, found, wanted in sorted(loading["mismatched_keys"])
        ]
        raise ValueError(
            f"{name} holds weights of other shapes than a {type(model).__name__} has here: "
            f"{_named(shapes)}; use a checkpoint of this model with as many labels, or one without "
            "a head."
            if head_is_new
            else f"{name} holds weights of other shapes than its config.json describes: "
            f"{_named(shapes)}; use the files of one checkpoint."
        )
    return sorted({key.rpartition(".")[0] for key in new})


def _named(items: list[str]) -> str:
    more = len(items) - MOST_NAMED
    return ", ".join(items[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
