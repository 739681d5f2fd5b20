"""Liger's norms, rope and SwiGLU in the frozen blocks, beside our step and our loss."""

from __future__ import annotations

from typing import Any

HEADS = ("fused_linear_cross_entropy", "cross_entropy")
"""Liger's ways of the loss, by the names that `liger_kernel_config` has for them."""


def fit_liger(args: Any, model: Any) -> None:
    """Let a trainer put Liger's layers into its model when training begins, and no loss of its own.

    By default Liger replaces the whole forward of a model, head and loss too, as if every model of
    the architecture were a language model.

    Args:
        args: The trainer's, with `use_liger_kernel`; its `liger_kernel_config` is completed.
        model: The backbone.

    Raises:
        ValueError: It could not take effect.
    """
    if args.device.type == "cpu":
        raise ValueError(
            "`use_liger_kernel` is true, but Liger's kernels are for GPUs and this run computes on "
            "the CPU; leave the option out."
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"`use_liger_kernel` is true, but Liger has no kernels for models of the type "
            f"{kind!r}, only for {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}; leave the "
            "option out."
        )
    given = args.liger_kernel_config or {}
    for option in HEADS:
        if given.get(option):
            raise ValueError(
                f"`liger_kernel_config` has `{option}`, a loss in the place of the run's own, "
                "which works at supervised positions only; leave it out."
            )
    args.liger_kernel_config = {**given, **dict.fromkeys(HEADS, False)}
