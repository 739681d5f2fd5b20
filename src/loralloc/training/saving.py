"""A model's `save_pretrained` that saves what its method saves, or says why it may not."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralloc.methods.method import Method


def saving_with(method: Method, save: Callable[[Path, dict[str, Any]], None]) -> Any:
    """What takes the place of `save_pretrained` of a method's model, with the same signature.

    A copy of the model saves itself as it did.

    Args:
        method: Its model is the one that is saved.
        save: Writes a folder; given PEFT's options beside it. The model's own way is called inside.
    """
    own = type(method.model).save_pretrained
    signature = inspect.signature(own)
    is_saving = False

    @functools.wraps(own)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_saving
        if is_saving or model is not method.model:
            return own(model, *args, **kwargs)
        given = signature.bind(model, *args, **kwargs).arguments
        options = {**given.pop("kwargs", {}), **given}
        options.pop("self")
        is_saving = True
        try:
            save(Path(options.pop("save_directory")), options)
        finally:
            is_saving = False
        return None

    return types.MethodType(save_pretrained, method.model)


def refuse_unfinished(method: Method) -> None:
    """Let nothing be saved as a method's result that is not.

    Raises:
        RuntimeError: The method has not done what it is for.
    """
    if reason := method.unfinished():
        raise RuntimeError(reason)
