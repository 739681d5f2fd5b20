"""Several trainers on one frozen backbone: each step's batches go through it as one.

Every run keeps its own model, trainer, optimiser, schedule and method. The models share their
frozen weights, so that K of them take no more memory than one and K adapters. What is common is the
backbone's body, from embeddings to the last hidden states, which is most of the work and, with
small batches, mostly waiting for kernels to be launched: there, the runs meet. Their batches are
padded to one length and put one below the other; every linear layer is one product for all rows,
and the rows of run k go through adapter k (`kernels.batched`). Each run then has its hidden states
back, and its head, loss, metrics, clipping, optimiser step, rounds and checkpoints are those that
it would have alone, by the same code. On the way back the gradients by the hidden states of all
runs go through the body together, which gives every adapter its own.

What a run measures between steps (scores of ranks) goes through its own model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from loralloc.allocation.layers import base_model
from loralloc.kernels.batched import BlockedLinear, BlockedModule, Blocks
from loralloc.training.lockstep import Lockstep, World
from loralloc.training.replaced import give_back, replace, replaced

PADDED_WITH = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
"""What a batch is made longer with, beside `input_ids`, whose padding the model knows."""

OF_THE_LOSS = ("num_items_in_batch",)
"""Arguments that heads pass on and no body reads."""


def body_of(model: nn.Module) -> nn.Module:
    """A model's backbone without its head."""
    base: Any = base_model(model)
    body: nn.Module = base.base_model
    return body


@dataclass(kw_only=True)
class _Forward:
    """A run asks for its hidden states."""

    arguments: dict[str, Any]
    """Those of the body's forward that are given."""

    with_graph: bool
    is_training: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What batches have in common that go through the body together."""
        others = {k: v for k, v in self.arguments.items() if not isinstance(v, Tensor)}
        rows = len(self.arguments["input_ids"])
        return rows, self.with_graph, self.is_training, tuple(sorted(map(repr, others.items())))


@dataclass(kw_only=True)
class _Part:
    """What one run was given of a forward pass."""

    whole: dict[str, Tensor]
    """The outputs for all runs, by their names, with their graph."""

    rows: slice
    own: dict[str, Tensor]
    """The run's, whose gradients are the beginning of the way back."""


@dataclass(kw_only=True)
class _Backward:
    """A run has gradients by its hidden states."""

    parts: list[_Part] = field(default_factory=list)


class Fleet:
    """Trainers of one frozen backbone that step together.

    Args:
        trainers: Their models are PEFT models with one plain LoRA adapter each, which share their
            frozen weights. Their batches have as many rows, or they do not go together.
        padding: The token that `input_ids` are padded with.

    Raises:
        TypeError: The models do not share their weights.
    """

    def __init__(self, trainers: Sequence[Trainer], *, padding: int) -> None:
        self._trainers = list(trainers)
        self._padding = padding
        self._blocks = Blocks()
        self._body = _joint_body([trainer.model for trainer in trainers], self._blocks)

    def run(self, tasks: Sequence[Callable[[], Any]], worlds: Sequence[World]) -> list[Any]:
        """Carry out what calls each trainer's `train()`, all at once.

        Args:
            tasks: One for each trainer.
            worlds: The random generators and the like that each begins with.

        Returns:
            What each task returned, or the exception that ended it; the others go on without it.
        """
        steps = Lockstep(tasks, worlds)
        given: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        try:
            for number, trainer in enumerate(self._trainers):
                compute_loss, backward = _joined(steps, number, trainer)
                for owner, values in (
                    (trainer, {"compute_loss": compute_loss}),
                    (trainer.accelerator, {"backward": backward}),
                ):
                    given.append((owner, values, replace(owner, values)))
            return steps.run(self._serve)
        finally:
            for owner, values, before in given:
                give_back(owner, values, before)

    def _serve(self, requests: Mapping[int, Any]) -> dict[int, Any]:
        """Ways back first, so that runs which wait for a way forward go it together."""
        back = {n: request for n, request in requests.items() if isinstance(request, _Backward)}
        if back:
            _backward(list(back.values()))
            return dict.fromkeys(back)
        groups: dict[tuple[Any, ...], dict[int, _Forward]] = {}
        for number, request in requests.items():
            groups.setdefault(request.kind, {})[number] = request
        answers: dict[int, Any] = {}
        for group in groups.values():
            answers |= self._forward(group)
        return answers

    def _forward(self, group: Mapping[int, _Forward]) -> dict[int, Any]:
        """Outputs of the body for each run, with the part that the way back begins with."""
        numbers, requests = tuple(sorted(group)), [group[number] for number in sorted(group)]
        first = requests[0]
        rows = len(first.arguments["input_ids"])
        lengths = [request.arguments["input_ids"].shape[1] for request in requests]
        self._blocks.adapters, self._blocks.num_rows = numbers, rows * len(numbers)
        if self._body.training != first.is_training:
            self._body.train(first.is_training)
        with torch.set_grad_enabled(first.with_graph):
            outputs = self._body(**self._merged(requests, max(lengths)))
        whole = {name: value for name, value in outputs.items() if value is not None}
        _check_outputs(whole)
        answers = {}
        for place, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            part = slice(place * rows, (place + 1) * rows)
            own = {}
            for name, value in whole.items():
                of_run = value[part, :length] if value.ndim == 3 else value[part]
                own[name] = of_run.detach().contiguous().requires_grad_(value.requires_grad)
            answers[number] = type(outputs)(**own), _Part(whole=whole, rows=part, own=own)
        return answers

    def _merged(self, requests: Sequence[_Forward], longest: int) -> dict[str, Any]:
        """The arguments for all runs, padded behind to one length."""
        merged = dict(requests[0].arguments)
        names = {n for r in requests for n, v in r.arguments.items() if isinstance(v, Tensor)}
        if any(r.arguments["input_ids"].shape[1] < longest for r in requests):
            names.add("attention_mask")
        for name in names:
            values = []
            for request in requests:
                ids = request.arguments["input_ids"]
                value = request.arguments.get(name)
                if value is None and name == "attention_mask":
                    value = torch.ones_like(ids)
                is_known = name == "input_ids" or name in PADDED_WITH
                if value is None or value.shape != ids.shape or not is_known:
                    raise TypeError(
                        f"The backbone is given `{name}`, of which it is not known how batches of "
                        "several runs are put together; train one by one."
                    )
                filler = self._padding if name == "input_ids" else PADDED_WITH[name]
                values.append(functional.pad(value, (0, longest - ids.shape[1]), value=filler))
            merged[name] = torch.cat(values)
        return merged


def _joined(
    steps: Lockstep, number: int, trainer: Trainer
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A trainer's `compute_loss` and its accelerator's `backward`, through the common body."""
    body = body_of(trainer.model)
    signature = inspect.signature(type(body).forward)
    own_loss, own_backward = trainer.compute_loss, trainer.accelerator.backward
    parts: list[_Part] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = _Forward(
            arguments=_given(signature, body, args, kwargs),
            with_graph=torch.is_grad_enabled(),
            is_training=body.training,
        )
        outputs, part = steps.ask(number, request)
        if request.with_graph:
            parts.append(part)
        return outputs

    @functools.wraps(own_loss)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        with replaced(body, {"forward": forward}):
            return own_loss(*args, **kwargs)

    @functools.wraps(own_backward)
    def backward(loss: Tensor, **kwargs: Any) -> None:
        own_backward(loss, **kwargs)
        request = _Backward(parts=list(parts))
        parts.clear()
        steps.ask(number, request)

    return compute_loss, backward


def _given(
    signature: inspect.Signature, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a body's forward by name, without those that say nothing."""
    bound = signature.bind(body, *args, **kwargs).arguments
    variable = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in variable:
        bound |= bound.pop(name, {})
    del bound["self"]
    if bound.get("input_ids") is None:
        raise TypeError(
            f"The {type(body).__name__} is not given `input_ids`, by which the batches of several "
            "runs are put together; train one by one."
        )
    given = {k: v for k, v in bound.items() if v is not None and k not in OF_THE_LOSS}
    return {**given, "use_cache": False} if "use_cache" in signature.parameters else given


def _backward(requests: Sequence[_Backward]) -> None:
    """Take the gradients of all runs back through the body; every adapter then has its own."""
    wholes: dict[int, dict[str, Tensor]] = {}
    gradients: dict[int, dict[str, Tensor]] = {}
    for part in (part for request in requests for part in request.parts):
        for name, own in part.own.items():
            if own.grad is None:
                continue
            whole = part.whole[name]
            wholes[id(part.whole)] = part.whole
            into = gradients.setdefault(id(part.whole), {})
            if name not in into:
                into[name] = torch.zeros_like(whole)
            of_run = into[name][part.rows]
            of_run[:, : own.shape[1]].copy_(own.grad) if own.ndim == 3 else of_run.copy_(own.grad)
            own.grad = None
    for key, by_name in gradients.items():
        torch.autograd.backward([wholes[key][name] for name in by_name], list(by_name.values()))


def _check_outputs(outputs: Mapping[str, Any]) -> None:
    for name, value in outputs.items():
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            raise TypeError(
                f"The backbone puts out `{name}`, of which it is not known how it is divided among "
                "several runs; train one by one."
            )


def _joint_body(models: Sequence[Any], blocks: Blocks) -> nn.Module:
    """The body of all models: a copy of the first's modules around the same frozen weights."""
    bodies = [body_of(model) for model in models]
    first = bodies[0]
    frozen = {
        name: parameter
        for name, parameter in first.named_parameters()
        # Of a head that trains, PEFT keeps what it was.
        if not parameter.requires_grad and "original_module" not in name.split(".")
    }
    for body in bodies[1:]:
        own = dict(body.named_parameters())
        apart = [name for name in frozen if own.get(name) is not frozen[name]]
        if apart:
            raise TypeError(
                f"The models do not share the frozen weight {apart[0]}; load their backbone once."
            )
    memo: dict[int, Any] = {id(p): p for p in (*first.parameters(), *first.buffers())}
    for name, module in first.named_modules():
        kinds: tuple[tuple[Any, Any], ...] = (
            (LoraLayer, BlockedLinear),
            (ModulesToSaveWrapper, BlockedModule),
        )
        for of_each, of_all in kinds:
            if isinstance(module, of_each):
                memo[id(module)] = of_all([body.get_submodule(name) for body in bodies], blocks)
    return copy.deepcopy(first, memo)
