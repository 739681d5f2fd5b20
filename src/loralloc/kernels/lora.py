"""The LoRA linear as one autograd function: in the activation's dtype, saving what backward needs.

PEFT casts activations to float32 for its float32 A and B and lets autograd keep every intermediate.
Here the weights stay float32 masters, the arithmetic is the activation's, and backward keeps the
input and A x only. The frozen weight gets no gradient. Linears that read the same input (q, k, v;
gate, up) are one function with their A stacked, R rows in all:

    forward     h = (sA) x^T             y_i = x W_i^T + b_i + h_i^T B_i^T
    backward    dh_i = B_i^T dy_i^T      dx = sum_i dy_i W_i + dh^T (sA)
                dA = s dh x              dB_i = (h_i dy_i)^T

After a few rounds every module has a rank of its own, and oneDNN compiles and keeps a product of
half precision for every shape and stride. So there ranks are rounded up to a multiple of `MULTIPLE`
with zeros, which change no sum, and h lies with a row a rank, so that no part of it depends on its
siblings' ranks. Products of float32 are not compiled, and have the ranks that there are.

Under autocast the arithmetic is autocast's. A frozen weight of another dtype is cast in every
forward and kept for backward, as autocast does it: kept from step to step, the copies would be half
as large again as a float32 model, which a run with gradient checkpointing never holds otherwise.
Whoever wants neither the casts nor the copies loads the model in bfloat16.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralloc.kernels.covered import has_frozen_linear, is_linear_of_peft, is_plain, is_whole
from loralloc.kernels.packed import Packed, Packs
from loralloc.kernels.products import add_linear, autocast_dtype, linear, without_autocast

FEW_ROWS = ("cpu",)
"""Devices on which a product with few rows and many columns is up to three times as fast as its
transpose. Elsewhere it costs the same, and dB is made as it lies in memory."""

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of sibling modules that read one tensor, in the order in which they are called."""

CROSS_ATTENTION = ("cross", "encdec", "encoder_attn")
"""Parts of the names of modules whose queries and keys read two tensors."""


def fuse(model: nn.Module) -> int:
    """Give every LoRA linear of a model the fused step, in place.

    The layers keep their parameters, names and everything else of PEFT's class, of which theirs
    becomes a subclass. A `RankGate` on A is put into B for the step. Whatever the fused step does
    not cover (several or merged adapters, variants such as DoRA, dropout, other hooks on A or B, an
    adapter switched off) runs PEFT's own forward, and so does a model under `torch.compile`, which
    fuses that in its own way.

    Returns:
        How many layers were changed.
    """
    parents: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    packs = Packs()
    for name, layer in model.named_modules():
        cls: Any = type(layer)
        if is_linear_of_peft(cls):
            layer.__class__ = _fused(cls)
            layer.packs = packs
            parent, _, own = name.rpartition(".")
            parents[parent][own] = layer
    for parent, children in parents.items():
        is_cross = any(part in parent.lower() for part in CROSS_ATTENTION)
        for names in () if is_cross else SAME_INPUT:
            siblings = [children[name] for name in names if name in children]
            shared = SharedInput(siblings) if len(siblings) > 1 else None
            for layer in siblings:
                layer.shared_input = shared
    return sum(map(len, parents.values()))


def unfuse(model: nn.Module) -> None:
    """Give every layer that `fuse` changed PEFT's own forward back."""
    for layer in model.modules():
        fused: Any = type(layer)
        if is_fused(layer):
            for name in ("shared_input", "packs"):
                vars(layer).pop(name, None)
            layer.__class__ = fused.__base__


def is_fused(layer: nn.Module) -> bool:
    """Whether a layer has the fused step."""
    return hasattr(type(layer), "shared_input")


def is_covered(layer: LoraLayer) -> bool:
    """Whether a layer has an adapter that the fused step covers in training, hooks aside."""
    return (is_fused(layer) or is_linear_of_peft(type(layer))) and any(
        name not in layer.lora_variant
        and not layer.lora_bias.get(name)
        and isinstance(dropout, nn.Identity)
        for name, dropout in layer.lora_dropout.items()
    )


class SharedInput:
    """Sibling layers that read the same tensor: the first that is called computes for all."""

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        """Take the layers in the order in which they are called."""
        self._layers = list(layers)
        self._input: Tensor | None = None
        self._outputs: dict[LoraLayer, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model takes over: outputs belong to one forward pass."""
        return {"_layers": self._layers, "_input": None, "_outputs": {}}

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        if layer in self._outputs and self._input is x:
            output = self._outputs.pop(layer)
        else:
            if layer in self._outputs:
                self._layers = [layer]  # cross-attention: they do not read the same tensor
            position = self._layers.index(layer) if layer in self._layers else len(self._layers)
            later = [other for other in self._layers[position + 1 :] if is_whole(other)]
            output, *others = _lora_linears(x, [layer, *later])
            self._input, self._outputs = x, dict(zip(later, others, strict=True))
        if not self._outputs:
            self._input = None
        return output


@functools.cache
def _fused(cls: Any) -> Any:
    """A subclass of one of PEFT's layers, with the fused step."""

    class Fused(cls):
        shared_input: SharedInput | None = None
        packs: Packs

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Shape (..., in_features) to (..., out_features)."""
            if args or kwargs or not is_plain(self) or getattr(self, "_is_replica", False):
                return cast(Tensor, super().forward(x, *args, **kwargs))
            if not has_frozen_linear(self):
                return _lora_update(x, self)
            if self.shared_input:
                return self.shared_input.output(self, x)
            return _lora_linears(x, [self])[0]

    Fused.__name__ = Fused.__qualname__ = f"Fused{cls.__name__}"
    return Fused


def _lora_linears(x: Tensor, layers: Sequence[LoraLayer]) -> tuple[Tensor, ...]:
    """The outputs of plain LoRA linears that read the same x."""
    bases: list[Any] = [layer._modules["base_layer"]._parameters for layer in layers]
    frozen = tuple((base["weight"], base["bias"]) for base in bases)
    packed, cast_to = _packed(x, layers)
    outputs: tuple[Tensor, ...] = _apply(
        _LoraLinears, x, packed, frozen, cast_to, *packed.a, *packed.b
    )
    return outputs


def _lora_update(x: Tensor, layer: LoraLayer) -> Tensor:
    """The output of a plain LoRA linear whose base layer has arithmetic of its own."""
    base, (packed, _) = layer.base_layer(x), _packed(x, [layer])
    return cast(Tensor, _apply(_LoraUpdate, x, packed, base, *packed.a, *packed.b))


def _packed(x: Tensor, layers: Sequence[LoraLayer]) -> tuple[Packed, torch.dtype | None]:
    """A and B of layers, and what autocast casts to, if it does."""
    first: Any = layers[0]
    packs: Packs = first.packs
    cast_to = autocast_dtype(x)
    return packs.get(layers, cast_to or x.dtype), cast_to


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _LoraLinears(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + s_i (x A_i^T) B_i^T for n frozen W_i, bias_i; n A, then n B.

    Of A and B the packed form is read; they are given so that their gradients are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Packed,
        frozen: Sequence[tuple[Tensor, Tensor | None]],
        cast_to: torch.dtype | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        shape = x.shape
        flat = x.reshape(-1, shape[-1])  # (tokens, in)
        if cast_to:  # so that autocast finds nothing left to cast
            flat = flat.to(cast_to)
            frozen = [(w, b if b is None else b.to(cast_to)) for w, b in frozen]
            frozen = [(w.to(cast_to), b) for w, b in frozen]
        h = packed.sa @ flat.t()  # (R, tokens)
        outputs = []
        for (w, bias), h_i, bt_i in zip(frozen, _parts(h, packed), packed.bt, strict=True):
            y = linear(flat, w, bias).addmm_(h_i.t(), bt_i)
            # Not a view, which may not be changed in place.
            outputs.append(y if len(shape) == 2 else y.resize_(*shape[:-1], y.shape[1]))
        needs_dx = ctx.needs_input_grad[0]
        ctx.save_for_backward(flat, h, *((w for w, _ in frozen) if needs_dx else ()))
        ctx.packed, ctx.shape = packed, shape
        ctx.dtypes = x.dtype, weights[0].dtype, weights[-1].dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        packed: Packed = ctx.packed
        flat, h, *ws = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat_dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = None
        with without_autocast(flat):
            needs_da = any(needed[FIRST_WEIGHT : FIRST_WEIGHT + len(dys)])
            dh, da, db = _update_gradients(
                flat if needs_da else None, h, packed, flat_dys, ctx.dtypes[1:]
            )
            if needed[0]:
                # Summed in x's dtype, as autograd sums the gradients of several readers.
                for w, dy in zip(ws, flat_dys, strict=True):
                    if dy is None:
                        continue
                    if dx is None:
                        dx = linear(dy, w.t()).addmm_(dh.t(), packed.sa).to(ctx.dtypes[0])
                    else:
                        add_linear(dx, dy, w.t())
                assert dx is not None, "one of the outputs has a gradient"
                dx = dx.view(ctx.shape)
        return dx, None, None, None, *da, *db


FIRST_WEIGHT = 4
"""Where the A begin among the arguments of `_LoraLinears`."""


class _LoraUpdate(torch.autograd.Function):
    """y = base + s (x A^T) B^T, for base layers with arithmetic of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(autocast_dtype(x) or x.dtype)
        (bt,) = packed.bt
        with without_autocast(x):
            h = packed.sa @ flat.t()
            update = h.t().to(base.dtype), bt.to(base.dtype)
            y = torch.addmm(base.reshape(-1, base.shape[-1]), *update)
        ctx.save_for_backward(flat, h)
        ctx.packed, ctx.shape, ctx.dtypes = packed, x.shape, (x.dtype, a.dtype, b.dtype)
        return y.resize_(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat, h = ctx.saved_tensors
        flat_dy = dy.reshape(-1, dy.shape[-1]).to(flat.dtype)
        with without_autocast(flat):
            dh, (da,), (db,) = _update_gradients(
                flat if ctx.needs_input_grad[3] else None, h, ctx.packed, [flat_dy], ctx.dtypes[1:]
            )
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (dh.t() @ ctx.packed.sa).to(ctx.dtypes[0]).view(ctx.shape)
        return dx, None, dy, da, db


def _parts(stacked: Tensor, packed: Packed) -> Sequence[Tensor]:
    """The rows of each layer."""
    return stacked.split_with_sizes(packed.heights) if len(packed.heights) > 1 else (stacked,)


def _update_gradients(
    x: Tensor | None,
    h: Tensor,
    packed: Packed,
    dys: Sequence[Tensor | None],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """dh, of shape (R, tokens), and every dA and dB in the master weights' dtypes.

    Without an x, for scoring, no dA.
    """
    dh = torch.zeros_like(h) if None in dys else torch.empty_like(h)
    db: list[Tensor | None] = []
    parts = _parts(dh, packed), _parts(h, packed)
    for dy, bt_i, rank, dh_i, h_i in zip(dys, packed.bt, packed.ranks, *parts, strict=True):
        if dy is None:
            db.append(None)
        else:
            torch.mm(bt_i, dy.t(), out=dh_i)
            db.append(_gradient_of_b(h_i, dy, rank, dtypes[1]))
    if x is None:
        return dh, [None] * len(dys), db
    # By beta = 0 nothing is read of `sa`, whose shape this has.
    scaling = 1.0 if packed.scaling is None else packed.scaling
    stacked = torch.addmm(packed.sa, dh, x, beta=0, alpha=scaling).to(dtypes[0])
    da = [
        da_i if rank == height else da_i[:rank]
        for da_i, rank, height in zip(
            _parts(stacked, packed), packed.ranks, packed.heights, strict=True
        )
    ]
    if packed.scaling is None:
        torch._foreach_mul_(da, packed.scalings)
    return dh, [*da], db


def _gradient_of_b(h: Tensor, dy: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """dB, shape (out, rank), in the order in which B lies in memory."""
    if h.device.type in FEW_ROWS:
        db = dy.new_empty(dy.shape[1], rank, dtype=dtype)
        return db.copy_((h @ dy)[:rank].t())
    if h.dtype == dtype:
        return dy.t() @ h[:rank].t()
    return (dy.t() @ h.t())[:, :rank].to(dtype)
