"""S(.) of eq. 6: minus the mean loss of a model on a fixed set of held-out examples.

Losses of ablations differ in their last digits, so they are computed in float32, or it is said why
not. In evaluation mode Transformers switches activation checkpointing off: a layer has its
activations computed again in the backward pass where it is asked to and is training. Training mode
is also what dropout goes by, in some layers' own code. So the layers stay in evaluation mode, and
what the training step does around their `forward` is done here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import IGNORED, SupervisedLoss
from loralloc.kernels.quantised import keep_unpacked

Batch = Mapping[str, Any]
"""Arguments of the model's forward, with the labels."""

Loss = Callable[[Batch], Tensor]
"""The mean loss of a batch, with its graph."""


LABELS = ("labels", "start_positions")
"""What a batch of labelled examples has one of."""

CACHES = ("past_key_values", "layer_past")
"""Names under which layers are given a cache, which computing them again would fill twice."""


FLOAT32_BYTES = 4


class Objective:
    """The scoring batch B_val and the loss on it, in micro-batches.

    It is the cross-entropy that the model itself computes, a causal language model's at supervised
    positions only, for the models of Transformers; the loss that the model puts out for any other
    model; and whatever is given as `loss`.

    Args:
        model: The adapted model, not wrapped for several processes.
        batches: Micro-batches as the model's forward takes them, with `labels` (or the
            `start_positions` and `end_positions` of span prediction); None where only losses of
            other batches are asked for.
        loss: The loss in the place of the model's. It may read batches of any kind.
        mixed: The run's mixed precision; see `precision.full_precision`.

    Raises:
        ValueError: The batches hold nothing that a loss is taken on.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        loss: Loss | None = None,
        mixed: torch.dtype | None = None,
    ) -> None:
        self.model = model
        keep_unpacked(model)  # training goes on after a look at importance
        self._loss = loss
        self._mixed = mixed
        self._shifts_labels = is_causal_lm(model)
        self._is_evaluating = False
        self._is_known = loss is None and has_known_loss(model)
        self._supervised = SupervisedLoss(model)
        self.batches = [b for b in batches or () if self.count_targets(b)]
        self.num_targets = sum(self.count_targets(batch) for batch in self.batches)
        if batches is not None and self.num_targets == 0:
            raise ValueError(
                "The scoring examples hold no supervised position, so importance cannot be "
                "measured; check the labels of the development set."
            )
        if loss is None and self.batches and not _is_labelled(self.batches[0]):
            with self.evaluating(), torch.no_grad():
                self.losses(self.batches[0])  # the model may have a loss without; if not, tells now

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss was given, and may do with the model what it likes."""
        return self._loss is not None

    @functools.cached_property
    def rounding(self) -> torch.dtype | None:
        """What losses are rounded to where it is coarser than float32, and None where it is not.

        Losses that are rounded more coarsely than one rank changes them cannot be told apart rank
        by rank. It is measured once, on the first micro-batch.
        """
        coarsest = Coarsest()
        with self.evaluating(), torch.no_grad(), coarsest:
            self.losses(self.batches[0])
        return coarsest.dtype

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each of the batch's targets, row after row, in float32 with its graph.

        Returns:
            Shape (num_targets,); a scalar, their sum, where no more than their mean is known.
        """
        if self._loss is not None:
            return self._loss(batch).float() * self.count_targets(batch)
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self._is_known and self._shifts_labels:
            return self._supervised(inputs).losses
        outputs: Any = self.model(**inputs)
        if self._is_known and self._has_classes(outputs, inputs):
            return F.cross_entropy(outputs.logits.float(), inputs["labels"], reduction="none")
        if self._is_known and "start_logits" in outputs:
            return _span_losses(outputs, inputs)
        return _mean_loss(outputs, batch).float() * self.count_targets(batch)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's targets, a float32 scalar with its graph."""
        return self.losses(batch).sum()

    def mean_loss(self) -> float:
        """Mean loss over all targets, without a graph."""
        with torch.no_grad():
            total = sum(float(self.loss_sum(batch)) for batch in self.batches)
        return total / self.num_targets

    def count_targets(self, batch: Batch) -> int:
        """Positions (causal), labels (otherwise) or examples (without labels) to take loss on."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            if self._is_known and self._shifts_labels:
                raise ValueError(
                    f"A scoring batch has no `labels`, only {', '.join(batch)}; importance is "
                    "measured on labelled held-out examples."
                )
            return count_examples(batch)
        if self._shifts_labels and labels.ndim > 1:
            labels = labels[:, 1:]
        return int((labels != IGNORED).sum())

    def _has_classes(self, outputs: Any, inputs: Batch) -> bool:
        """Whether each example is of one class; one number alone is a regression's."""
        labels, logits = inputs.get("labels"), outputs.get("logits")
        config: Any = base_model(self.model).config
        return (
            isinstance(labels, Tensor)
            and labels.ndim == 1
            and not labels.is_floating_point()
            and logits.ndim == 2
            and logits.shape[1] > 1
            and getattr(config, "problem_type", None) != "regression"
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode in full precision, with everything as it was afterwards.

        What training computes again to save memory is computed again here too.
        """
        if self._is_evaluating:
            yield
            return
        self._is_evaluating = True
        try:
            with (
                evaluation_mode(self.model),
                full_precision(self.model, mixed=self._mixed),
                checkpointing_kept(self.model),
            ):
                yield
        finally:
            self._is_evaluating = False


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the modules train that trained."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True  # past `__setattr__`, which looks at much more


def _is_labelled(batch: Batch) -> bool:
    return any(key in batch for key in LABELS)


def count_examples(batch: Any) -> int:
    """Rows of a micro-batch."""
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    if isinstance(batch, Mapping):
        values = [batch[key] for key in LABELS if key in batch] + values
    return next((len(x) for x in values if isinstance(x, Tensor) and x.ndim), 1)


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


def _mean_loss(outputs: Any, batch: Batch) -> Tensor:
    """The loss that the model puts out, where Trainer looks for it."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"The model gives no loss for a scoring batch of {', '.join(batch)}; importance is "
            "measured on labelled held-out examples, on which the model or the trainer has a loss."
        )
    return loss


def has_known_loss(model: nn.Module) -> bool:
    """Whether the model's loss is the one that Transformers gives its class, from a head it has."""
    base: Any = base_model(model)
    forward: Any = type(base).forward
    return (
        forward.__module__.split(".")[0] in ("transformers", "liger_kernel")
        and base.config.return_dict
        and "_loss_function" not in vars(base)
        and not (is_causal_lm(model) and base.get_output_embeddings() is None)
    )


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts each next token, so that labels are to be shifted."""
    base: Any = base_model(model)
    names = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    config = getattr(base, "config", None)
    is_decoder_only = not getattr(config, "is_encoder_decoder", config is None)
    return type(base).__name__.endswith(names) and is_decoder_only


@contextmanager
def full_precision(model: nn.Module, *, mixed: torch.dtype | None = None) -> Iterator[None]:
    """Let a model whose weights are float32 compute in float32 inside; any other as in its run.

    Accelerate puts mixed precision into the `forward` of the model, where no context from outside
    reaches, and keeps the model's own beside it. A model with other weights may not run without
    mixed precision at all, and would be no more exact.

    Args:
        model: The model, not wrapped for several processes.
        mixed: The run's mixed precision, for a model that Accelerate has not prepared yet.
    """
    device = next(model.parameters()).device.type
    forward: Any = vars(model).get("forward")
    own: Any = vars(model).get("_original_forward")
    if not _is_float32(model):
        with torch.autocast(device, dtype=mixed) if mixed and own is None else nullcontext():
            yield
        return
    if own is not None:
        model.forward = own
    try:
        with torch.autocast(device, enabled=False), _exact_products():
            yield
    finally:
        if own is not None:
            model.forward = forward


class Coarsest(TorchFunctionMode):
    """Watches what is computed inside, for floating-point numbers with fewer bits than float32.

    What a module puts out does not tell: a quantised layer multiplies in bfloat16 and hands on
    float32, and its rounding is there all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        """The first coarser one that was seen."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and look at what came out."""
        found = func(*args, **(kwargs or {}))
        if self.dtype is None:
            for value in tree_leaves(found):
                if isinstance(value, Tensor) and _is_coarse(value):
                    self.dtype = value.dtype
        return found


def _is_coarse(value: Tensor) -> bool:
    return value.is_floating_point() and value.element_size() < FLOAT32_BYTES


def _is_float32(model: nn.Module) -> bool:
    """Whether all weights that are numbers as they stand are; quantised ones are codes."""
    return not any(map(_is_coarse, model.parameters()))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 numbers in float32, where the user lets them be rounded (TF32)."""
    backends: Any = torch.backends
    places = [place.matmul for place in (backends.cuda, backends.mkldnn)]
    if not all(hasattr(place, "fp32_precision") for place in places):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    rounded = {place: place.fp32_precision for place in places}
    rounded = {place: value for place, value in rounded.items() if value not in ("ieee", "none")}
    for place in rounded:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in rounded.items():
            place.fp32_precision = value


@contextmanager
def checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Layers whose activations are computed again in training do so in evaluation, inside.

    Reentrant checkpointing gives no gradient of chosen tensors, and rests.
    """
    layers = [layer for layer in model.modules() if _is_checkpointed(layer)]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def can_be_kept(model: nn.Module) -> bool:
    """Whether the model's layers are of the kind that `checkpointing_kept` knows."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def _is_checkpointed(module: nn.Module) -> bool:
    if not (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
        return False
    function = module._gradient_checkpointing_func
    return not getattr(function, "keywords", {}).get("use_reentrant", False)


def _recomputed(layer: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer so that only what it reads is kept, where there is a graph to keep it for."""
    if not (torch.is_grad_enabled() and layer.gradient_checkpointing):
        return forward(*args, **kwargs)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if not layer._can_checkpoint_with_cache:
        kwargs |= dict.fromkeys(name for name in CACHES if name in kwargs)
    return layer._gradient_checkpointing_func(functools.partial(forward, **kwargs), *args)
