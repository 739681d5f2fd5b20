"""S(.) of eq. 6: minus the mean cross-entropy of a model on a fixed set of held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import IGNORED, SupervisedLoss

Batch = Mapping[str, Any]
"""Arguments of the model's forward, with the labels."""


class Objective:
    """The scoring batch B_val and the loss on it, in micro-batches.

    Losses are taken in evaluation mode and in float32, a causal language model's at supervised
    positions only.

    Args:
        model: The adapted model, not wrapped for several processes.
        batches: Micro-batches as the model's forward takes them, with `labels` (or the
            `start_positions` and `end_positions` of span prediction); None where only losses of
            other batches are asked for.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:
        self.model = model
        self.is_causal = is_causal_lm(model)
        self._supervised = SupervisedLoss(model)
        self.batches = [b for b in batches or () if self.count_targets(b)]
        self.num_targets = sum(self.count_targets(batch) for batch in self.batches)
        if batches is not None and self.num_targets == 0:
            raise ValueError(
                "The scoring examples hold no supervised position, so importance cannot be "
                "measured; check the labels of the development set."
            )

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def is_rounded(self) -> bool:
        """Whether losses are too coarse to be told apart rank by rank: a backbone below float32."""
        return next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)

    def losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of each of the batch's targets, row after row, in float32 with its graph.

        Returns:
            Shape (num_targets,); a scalar, their sum, where the model tells no more than its mean.
        """
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.is_causal:
            return self._supervised(inputs).losses
        labels = inputs.get("labels")
        outputs: Any = self.model(**inputs)
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            return F.cross_entropy(outputs.logits.float(), labels, reduction="none")
        if "start_logits" in outputs:
            return _span_losses(outputs, inputs)
        loss: Tensor = outputs.loss.float()
        return loss * self.count_targets(batch)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the batch's targets, a float32 scalar with its graph."""
        return self.losses(batch).sum()

    def mean_loss(self) -> float:
        """Mean cross-entropy over all targets, without a graph."""
        with torch.no_grad():
            total = sum(float(self.loss_sum(batch)) for batch in self.batches)
        return total / self.num_targets

    def count_targets(self, batch: Batch) -> int:
        """Positions (causal), labels (otherwise) or examples (spans) that loss is taken on."""
        if "start_positions" in batch:
            return len(batch["start_positions"])
        if "labels" not in batch:
            raise ValueError(
                f"A scoring batch has no `labels`, only {', '.join(batch)}; importance is measured "
                "on labelled held-out examples."
            )
        labels = batch["labels"]
        if self.is_causal:
            return int((labels[:, 1:] != IGNORED).sum())
        return int((labels != IGNORED).sum())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, with every module's own mode restored afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _span_losses(outputs: Any, inputs: Batch) -> Tensor:
    """Cross-entropy of each example's span: the mean of its beginning's and its end's.

    As Transformers has it, positions past the end of the text were cut off and count for nothing.
    """
    losses = []
    for side in ("start", "end"):
        logits: Tensor = outputs[f"{side}_logits"].float()  # (num_examples, length)
        length = logits.shape[1]
        target = inputs[f"{side}_positions"].view(-1).clamp(0, length)
        losses.append(F.cross_entropy(logits, target, ignore_index=length, reduction="none"))
    return torch.stack(losses).mean(0)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts each next token, so that labels are to be shifted."""
    base: Any = base_model(model)
    names = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    is_decoder_only = not base.config.is_encoder_decoder
    return type(base).__name__.endswith(names) and is_decoder_only
