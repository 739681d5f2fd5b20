"""Arguments of Transformers' `from_pretrained` that a user gives, in `model_init_kwargs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

OWN_OPTIONS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
    "quantization_config": "load_in_4bit",
    **dict.fromkeys(("num_labels", "id2label", "label2id", "config", "state_dict"), ""),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes"), ""),
}
"""Arguments of `from_pretrained` that a run gives, and the options that they follow from."""


def checked(more: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The arguments, once it is known that none has an option of its own.

    Raises:
        ValueError: One has, or they are no mapping.
    """
    if isinstance(more, str) and more.lstrip().startswith("{"):  # as a flag gives it
        more = json.loads(more)
    if not isinstance(more, Mapping | None):
        raise ValueError(
            f"`model_init_kwargs` is {more!r:.60}; it must be a mapping of arguments, such as "
            '`{"use_kernels": true}`.'
        )
    for name in more or {}:
        if name in OWN_OPTIONS:
            use = OWN_OPTIONS[name]
            raise ValueError(
                f"`model_init_kwargs` has {name!r}, which "
                + (f"has an option of its own; use `--{use}`." if use else "a run sets itself.")
            )
    return dict(more or {})
