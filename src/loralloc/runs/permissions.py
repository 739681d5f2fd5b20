"""What a run folder may not grant: running code, uploading, reporting, keeping secrets.

A folder may come from anybody. What it says of these is not followed: whoever opens it says so
again, with a flag or in a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRETS = ("hub_token",)
"""Options that are written nowhere."""

PERMISSIONS = (
    *("trust_remote_code", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
    *("hub_private_repo", "hub_always_push", "hub_revision", "report_to", "deepspeed"),
    *("fsdp", "fsdp_config", "accelerator_config"),
)
"""Options that let a run execute code, upload, report, or start an engine by a configuration."""

OF_A_MODEL = ("trust_remote_code", "code_revision", "token", "use_auth_token")
"""The same among the arguments of `from_pretrained`."""

IMPORTS = ("method", "allocation.score", "allocation.policy")
"""Options that may name what is to be imported, as "package.module:name"."""

NOTHING: tuple[Any, ...] = (None, False, "none", "no", "", [], ["none"], {})
"""Values that grant nothing."""


def granted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's saved values that nothing but its user may grant."""
    found = {n: values[n] for n in PERMISSIONS if values.get(n) not in NOTHING}
    found |= {n: values[n] for n in IMPORTS if ":" in str(values.get(n, ""))}
    if "/" in str(values.get("attn_implementation") or ""):  # a kernel of the Hub's, which is code
        found["attn_implementation"] = values["attn_implementation"]
    if not _is_harmless(values.get("model_init_kwargs")):
        found["model_init_kwargs"] = values["model_init_kwargs"]
    return found


def _is_harmless(kwargs: Any) -> bool:
    """Whether arguments of `from_pretrained`, which may be JSON, grant nothing."""
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except (ValueError, RecursionError):
            return False
    if kwargs is None:
        return True
    return isinstance(kwargs, dict) and all(kwargs.get(name) in NOTHING for name in OF_A_MODEL)


def without_permissions(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved values without what they may not grant."""
    withheld = {*granted(values), *PERMISSIONS}
    return {name: value for name, value in values.items() if name not in withheld}


def check_granted_again(folder: Path, values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on without what a run was begun with and its folder may not grant.

    Args:
        folder: The run folder.
        values: Its saved values.
        given: The options that are given now.

    Raises:
        ValueError: One is missing; the folder alone does not grant it.
    """
    missing = [name for name in granted(values) if name not in given]
    if missing:
        name = missing[0]
        said = "(not shown)" if name in SECRETS else f"{values[name]!r:.100}"
        raise ValueError(
            f"The run in {folder} was begun with `{name}` of {said}, which a folder may not grant, "
            f"since it can come from anybody; if you trust it, give `--{name}` again, and if not, "
            "give another value."
        )
