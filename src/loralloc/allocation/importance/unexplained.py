"""The largest directions of dL/dW that an adapter does not explain, without making dL/dW.

Of a module with input x and output y, G = dL/dW is the sum of dy x^T over all tokens. A new rank
with a row a of A and B = 0 sees the gradient dL/db = s G a. So the rows worth having are those with
the largest |G a| that are not there yet: the first right singular vectors of G P, where P takes out
the span of the rows of A. Subspace iteration finds them from the products G Q and G^T U alone,
which are sums over tokens too and are gathered in backward passes:

    Y = G Q          U = orth(Y)          Z = P G^T U          Q = orth(Z)

In the end the singular values of Z are those of G P on the subspace, and its left singular vectors
the directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loralloc.allocation import replicas
from loralloc.allocation.importance.path import frozen
from loralloc.allocation.layers import weight_a
from loralloc.allocation.objective import Objective

ITERATIONS = 2
"""Turns of the iteration, two backward passes each. On the tiny models of the tests the first value
comes out within 2%, the third within 10%."""

MORE = 4
"""Directions that are followed beyond those that are asked for, which makes the last of these as
exact as the first."""

NOTHING = 1e-6
"""Share of a module's largest value below which a direction is rounding."""

Take = Callable[[Tensor, Tensor], None]
"""Takes x, shape (tokens, in_features), and dy, shape (tokens, out_features), of one call."""


@dataclass(frozen=True, kw_only=True)
class Unexplained:
    """What of a module's dL/dW its adapter does not explain."""

    values: Tensor
    """The largest singular values of s G P, descending, shape (num,), float32 on the CPU."""

    rows: Tensor
    """Their right singular vectors, shape (num, in_features), float32 on the CPU: of length 1,
    orthogonal to each other and to the rows of A."""

    own: Tensor
    """|dL/db_r| = |s G a_r| of the ranks that are there, shape (num_ranks,), float32 on the CPU."""


def measure(
    objective: Objective,
    layers: Mapping[str, LoraLayer],
    wanted: Mapping[str, int],
    *,
    generator: torch.Generator,
    adapter_name: str = "default",
) -> dict[str, Unexplained]:
    """The largest unexplained directions of modules, by `2 * ITERATIONS` backward passes.

    Beside what a training step holds it takes two matrices a module, of `wanted + MORE` columns.

    Args:
        objective: The scoring batch and the model.
        layers: The adapted layers, in model order.
        wanted: Directions that are asked for, by module; fewer are found where G P has no more.
        generator: Where the first directions are drawn from, on the CPU.
        adapter_name: PEFT's name of the adapter.

    Raises:
        FloatingPointError: A gradient is not finite.
    """
    spans = {
        name: _Span(weight_a(layers[name], adapter_name), count + MORE, generator)
        for name, count in wanted.items()
        if count
    }
    chosen = {name: layers[name] for name in spans}
    for turn in range(ITERATIONS):
        rows = {name: span.asking(with_own=turn == 0) for name, span in spans.items()}
        for name, y in _summed(objective, chosen, rows, of_input=True).items():
            spans[name].take_outputs(y, with_own=turn == 0)
        columns = {name: span.outputs for name, span in spans.items()}
        for name, z in _summed(objective, chosen, columns, of_input=False).items():
            spans[name].take_inputs(z)
    return {
        name: span.found(wanted[name], float(layers[name].scaling[adapter_name]))
        for name, span in spans.items()
    }


class _Span:
    """The subspace of one module."""

    def __init__(self, a: Tensor, width: int, generator: torch.Generator) -> None:
        in_features = a.shape[1]
        self.a = a.detach().float()
        self.basis = torch.linalg.qr(self.a.t()).Q  # (in, min(r, in)), spans the rows of A
        width = max(min(width, in_features - self.basis.shape[1]), 0)
        drawn = torch.randn(in_features, width, generator=generator).to(self.a)
        self.inputs = torch.linalg.qr(self._outside(drawn)).Q  # (in, width)
        self.outputs = self.inputs.new_empty(0, 0)
        self.own = self.values = self.inputs.new_empty(0)

    def asking(self, *, with_own: bool) -> Tensor:
        """Columns whose products with G are asked for, shape (in, num)."""
        return torch.cat([self.inputs, self.a.t()], dim=1) if with_own else self.inputs

    def take_outputs(self, y: Tensor, *, with_own: bool) -> None:
        width = self.inputs.shape[1]
        if with_own:
            self.own = y[:, width:].norm(dim=0)
        self.outputs = torch.linalg.qr(y[:, :width]).Q

    def take_inputs(self, z: Tensor) -> None:
        u, self.values, _ = torch.linalg.svd(self._outside(z), full_matrices=False)
        self.inputs = self._outside(u)  # again: what is small in z was inside, relative to its size

    def found(self, count: int, scaling: float) -> Unexplained:
        is_there = self.values > NOTHING * float(self.values.max()) if len(self.values) else None
        count = 0 if is_there is None else min(count, int(is_there.sum()))
        rows = self.inputs[:, :count].t()
        return Unexplained(
            values=(abs(scaling) * self.values[:count]).cpu(),
            rows=torch.nn.functional.normalize(rows, dim=1).cpu().contiguous(),
            own=(abs(scaling) * self.own).cpu(),
        )

    def _outside(self, columns: Tensor) -> Tensor:
        """P times these columns."""
        outside: Tensor = columns - self.basis @ (self.basis.t() @ columns)
        return outside


def _summed(
    objective: Objective,
    layers: Mapping[str, LoraLayer],
    factors: Mapping[str, Tensor],
    *,
    of_input: bool,
) -> dict[str, Tensor]:
    """G Q of every module for factors of the input's size, G^T U for such of the output's.

    Raises:
        FloatingPointError: One of them is not finite.
    """
    sums: dict[str, Tensor] = {}

    def take_for(name: str) -> Take:
        def take(x: Tensor, dy: Tensor) -> None:
            first, second = (x, dy) if of_input else (dy, x)
            product = second.t() @ (first @ factors[name])
            sums[name] = sums[name] + product if name in sums else product

        return take

    others = () if objective.has_own_loss else _trainable(objective.model)
    with objective.evaluating(), frozen(others), torch.enable_grad():
        for batch in objective.batches:
            with _watched(layers, take_for) as begin:
                loss = objective.loss_sum(batch) / objective.num_targets
                torch.autograd.grad(loss, [begin], allow_unused=True)
    for name, layer in layers.items():  # of a module that no example went through
        size = layer.out_features if of_input else layer.in_features
        sums.setdefault(name, factors[name].new_zeros(size, factors[name].shape[1]))
    sums = replicas.averaged({name: sums[name] for name in layers})
    bad = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if bad:
        raise FloatingPointError(f"the gradient of {bad[0]} is not finite")
    return sums


@contextmanager
def _watched(layers: Mapping[str, LoraLayer], take_for: Callable[[str], Take]) -> Iterator[Tensor]:
    """Each layer's input and gradient of the output are taken in backward passes inside.

    Yields:
        A tensor to take the gradient of, which leads backward to every layer.
    """
    first = next(iter(layers.values()), None)
    device = next(first.parameters()).device if first is not None else None
    begin = torch.zeros((), device=device, requires_grad=True)

    def hook_for(take: Take) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def watch(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            watched: Any = _Watch
            found: Tensor = watched.apply(output, inputs[0], begin, take)
            return found

        return watch

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(hook_for(take_for(name)))
            hooks.callback(handle.remove)
        yield begin


class _Watch(torch.autograd.Function):
    """The output as it is; x is kept as autograd keeps tensors, so that checkpointing drops it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, begin: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.take(x.reshape(-1, x.shape[-1]).float(), dy.reshape(-1, dy.shape[-1]).float())
        return dy, None, torch.zeros((), device=dy.device), None


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
