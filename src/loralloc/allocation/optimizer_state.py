"""What an optimiser keeps of a LoRA weight, known by name and carried over a change of its rank.

An optimiser is tried on a stand-in before it trains, so that state which cannot follow a resize is
refused before the first step: a copy of the weight (schedule-free's `z`), which zeros would pull
new ranks to, factored moments (Adafactor), state kept by name (LoRA-FA).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.experts import ranked
from loralloc.allocation.transfers import followed_by, slices

SHARED = frozenset({"step", "mu_product"})
"""One number a parameter, which new ranks take over: a count of steps, or a product over them."""

BY_ELEMENT = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # Adam and its kind, Lion
        *("compensation",),  # of rounding, in AnyPrecisionAdamW
        *("momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum"),  # SGD, RMSprop, Ada...
        *("prev", "step_size"),  # Rprop
        *("state1", "state2"),  # of bitsandbytes
    }
)
"""One number an element of the parameter; those of a rank follow the rank."""

BEGINS_WITH = {"sum": "initial_accumulator_value", "step_size": "lr"}
"""State in which an element begins with this option of its group; in all other it is zero."""

BY_GRADIENT = {
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2"), 2),
    **{"exp_inf": 1, "acc_delta": 0, "step_size": 0},
}
"""State that decides how large an update is, and the power of the gradient's size that it grows
with. Where a new rank begins with zeros in it beside an old count of steps, its first updates are
several times as large as its elders'."""

ONE_STATE = ("rmsprop", "adagrad")
"""Optimisers of bitsandbytes, by their `optimizer_name`, whose only state is of that kind."""

NOT_BY_RATE = {
    "step_size": "takes steps that a learning rate only begins with",
    "compensation": "keeps the rounding of its own steps",
}
"""State of optimisers whose steps cannot be scaled afterwards, and why."""

QUANTISED = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""Where bitsandbytes keeps state in 8 bits: the 256 values that a byte stands for, and the largest
magnitude of each block of `BLOCK` elements, by which its values are to be multiplied."""

BLOCK = 256

Weights = Mapping[str, tuple[nn.Parameter, nn.Parameter]]
"""A_m, shape (num_ranks, in_features), and B_m, shape (out_features, num_ranks), by module."""


def bare_optimizer(optimizer: Any) -> Optimizer | None:
    """The PyTorch optimiser under wrappers such as Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return cast("Optimizer | None", optimizer)


def check_optimizer(
    optimizer: Any, weights: Weights, *, new_state: str = "zero", rank_lr_power: float = 0.0
) -> None:
    """Refuse an optimiser under which ranks cannot move.

    Call it before the first step, when every parameter has its place in the optimiser. One that has
    no state of these weights is tried on stand-ins of its parameters, which changes nothing of it.
    One whose step fails on them is judged by what it kept until then, and again by `resize`.

    Args:
        optimizer: What trains the adapter, under wrappers or not.
        weights: What it is to train.
        new_state: What new ranks begin with; see `resize`.
        rank_lr_power: Whether modules have learning rates of their own; see `ModuleRates`.

    Raises:
        ValueError: A weight that trains is not in the optimiser.
        TypeError: It keeps state of which it is not known how it follows a change of rank, or none
            that "survivors" could hand on, or its steps do not follow a learning rate.
    """
    bare = bare_optimizer(optimizer)
    if bare is None:
        return
    check_state(bare, weights)
    kept = [bare.state.get(weight, {}) for pair in weights.values() for weight in pair]
    if not any(kept):
        tried = _tried(bare, weights)
        _check_keys(bare, tried)
        for param in sorted(tried, key=Tensor.numel, reverse=True):  # of true shapes first
            _judge(bare, param, tried[param])
        kept = list(tried.values())
    if new_state == "survivors" and not any(by_gradient(bare, state) for state in kept):
        raise _nothing_handed_on(bare)
    for key, why in NOT_BY_RATE.items() if rank_lr_power else ():
        if any(isinstance(state.get(key), Tensor) for state in kept):
            raise TypeError(
                f"{type(bare).__name__} {why}, so that `rank_lr_power` cannot give modules rates "
                'of their own; leave it out, or use an optimiser such as optim="adamw_torch".'
            )


def check_state(optimizer: Optimizer, weights: Weights, *, new_state: str = "zero") -> None:
    """Refuse what an optimiser keeps already, as `check_optimizer` does.

    Args:
        optimizer: What trains the adapter.
        weights: What it is to train.
        new_state: What new ranks begin with; see `resize`.

    Raises:
        ValueError: A weight that trains is not in the optimiser.
        TypeError: It keeps state of which it is not known how it follows a change of rank.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _check_keys(optimizer, optimizer.state)
    for name, pair in weights.items():
        for weight in pair:
            if weight.requires_grad and id(weight) not in known:
                raise ValueError(
                    f"A trainable LoRA weight of {name} is not in the optimiser, so its resized "
                    "form would never train; pass the optimiser that trains this adapter."
                )
            state = optimizer.state.get(weight, {})
            _judge(optimizer, weight, state)
            if new_state == "survivors" and state and not by_gradient(optimizer, state):
                raise _nothing_handed_on(optimizer)


def check_shapes(optimizer: Optimizer) -> None:
    """Check that state which follows the ranks has its parameter's shape.

    Fused optimisers do not check shapes: a stale one makes them write beyond the tensor.

    Raises:
        TypeError: Some has another shape.
    """
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if key in BY_ELEMENT and isinstance(value, Tensor) and value.shape != param.shape:
                raise _wrong_shape(optimizer, key, value, param)


def swap(
    optimizer: Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    kept: tuple[int, ...],
    added: int,
    *,
    dim: int,
    experts: int = 1,
    new_state: str = "zero",
    gradient: Tensor | None = None,
) -> None:
    """Put a resized parameter in the old one's place, with the state of the ranks that it kept.

    Args:
        optimizer: What trains the old parameter, if anything does.
        old: The parameter until now.
        new: The parameter from now on; one without elements leaves the optimiser.
        kept: Indices of the old ranks that are the first of the new.
        added: Number of new ranks behind them.
        dim: Dimension of the ranks, 0 of A and 1 of B.
        experts: How many experts have a part of every rank; see `ranked`.
        new_state: What new ranks begin with; see `resize`.
        gradient: How large the gradient of each new rank is, in units of those that stay, shape
            (added,); as large by default.
    """
    state = optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        for slot, param in enumerate(group["params"]):
            if param is not old:
                continue
            if new.numel() == 0:
                del group["params"][slot]
                if "param_names" in group:  # of an optimiser that was given named parameters
                    del group["param_names"][slot]
                return
            group["params"][slot] = new
            if state is not None:
                handed_on = by_gradient(optimizer, state) if new_state == "survivors" else {}
                optimizer.state[new] = _carried(
                    state, group, kept, added, dim, experts, handed_on, gradient
                )
            return


def by_gradient(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, int]:
    """The keys of a parameter's state that decide how large an update is, as `BY_GRADIENT`."""
    known = dict(BY_GRADIENT)
    if "state2" not in state and getattr(optimizer, "optimizer_name", "") in ONE_STATE:
        known["state1"] = 2
    return {key: power for key, power in known.items() if isinstance(state.get(key), Tensor)}


def _carried(
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    kept: tuple[int, ...],
    added: int,
    dim: int,
    experts: int,
    handed_on: Mapping[str, int],
    gradient: Tensor | None,
) -> dict[str, Any]:
    """The state of a parameter with the slices of the kept ranks, and what new ranks begin with.

    That is zero, or of the keys handed on the mean over the ranks that stay, of all where none do,
    times that power of how large the new rank's gradient is.
    """
    carried = dict(state)
    for key, value in state.items():
        if key not in BY_ELEMENT or value is None:
            continue
        in_blocks = byte_blocks(key, state)
        flat = dequantised(*in_blocks) if in_blocks else value
        whole, at = ranked(flat, experts, dim=dim)
        shape = list(whole.shape)
        shape[at] = added
        if key in handed_on:
            stay = torch.cat(slices(kept, whole, dim=at), dim=at) if kept else whole
            new = stay.mean(dim=at, keepdim=True).expand(shape)
            if gradient is not None:
                times = gradient.to(new) ** handed_on[key]
                new = new * times.view(-1, *[1] * (whole.ndim - 1 - at))
        else:
            new = whole.new_full(shape, float(group.get(BEGINS_WITH.get(key, ""), 0.0)))
        resized = followed_by(kept, whole, new, dim=at).contiguous()
        if experts > 1:
            resized = resized.flatten(dim, dim + 1)
        if in_blocks:
            carried[key], carried[QUANTISED[key][1]] = quantised(resized, in_blocks[1])
        else:
            carried[key] = resized
    return carried


def dequantised(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Values in float32 of state in 8 bits, of the same shape."""
    values = qmap[codes.flatten().long()].float()
    return (values * absmax.repeat_interleave(BLOCK)[: len(values)]).view(codes.shape)


def quantised(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of values, of the same shape, and the largest magnitude of each block."""
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=torch.finfo(absmax.dtype).tiny)[:, None]
    between = (qmap[1:] + qmap[:-1]).float() / 2  # a value above the k-th is nearer to code k + 1
    codes = torch.bucketize(scaled.flatten()[: len(flat)].contiguous(), between)
    return codes.to(torch.uint8).view(values.shape), absmax


def _check_keys(optimizer: Optimizer, state: Mapping[Any, Any]) -> None:
    """Refuse state that belongs to no parameter."""
    for key in state:
        if not isinstance(key, Tensor):
            raise _unknown(optimizer, f"state under {key!r}, which is no parameter")


def _judge(optimizer: Optimizer, param: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse state of a parameter that cannot follow a change of its rank."""
    in_blocks = [key for key in QUANTISED if key in state and byte_blocks(key, state)]
    beside = [name for key in in_blocks for name in QUANTISED[key]]
    for key, value in state.items():
        if value is None or key in beside:
            continue
        if key not in SHARED | BY_ELEMENT:
            raise _unknown(optimizer, f"`{key}` of every parameter")
        if key in SHARED:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise _wrong_shape(optimizer, key, value, param)
        elif type(value) is not Tensor:
            raise _unknown(optimizer, f"`{key}` as {type(value).__name__}")
        elif value.shape != param.shape:
            raise _wrong_shape(optimizer, key, value, param)
        elif getattr(value, "is_paged", False):
            raise _unknown(optimizer, f"`{key}` in memory that is paged")
        elif not value.is_floating_point() and key not in in_blocks:
            raise _unknown(optimizer, f"`{key}` as {value.dtype}")


def byte_blocks(key: str, state: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The codes, values and magnitudes of state that is in 8 bits; None of any other."""
    qmap_name, absmax_name = QUANTISED.get(key, ("", ""))
    codes, qmap, absmax = state[key], state.get(qmap_name), state.get(absmax_name)
    if not (isinstance(codes, Tensor) and codes.dtype == torch.uint8):
        return None
    if not (isinstance(qmap, Tensor) and isinstance(absmax, Tensor) and qmap.shape == (256,)):
        return None
    num_blocks = -(-codes.numel() // BLOCK)
    return (codes, qmap, absmax) if absmax.shape == (num_blocks,) else None


def _unknown(optimizer: Optimizer, what: str) -> TypeError:
    return TypeError(
        f"{type(optimizer).__name__} keeps {what}, and how that follows a change of rank is not "
        'known; use an optimiser such as optim="adamw_torch".'
    )


def _nothing_handed_on(optimizer: Optimizer) -> TypeError:
    return TypeError(
        f"{type(optimizer).__name__} keeps nothing of the size of gradients, so that "
        '`new_state="survivors"` would have no effect; leave it out, or use an optimiser such as '
        'optim="adamw_torch".'
    )


def _wrong_shape(optimizer: Optimizer, key: str, value: Tensor, param: Tensor) -> TypeError:
    return TypeError(
        f"{type(optimizer).__name__} keeps `{key}` of shape {tuple(value.shape)} for a parameter "
        f"of shape {tuple(param.shape)}, which cannot follow a change of rank; use an optimiser "
        'with state shaped like its parameters, such as optim="adamw_torch".'
    )


def _tried(optimizer: Optimizer, weights: Weights) -> Mapping[Any, Any]:
    """The state that an optimiser's first step makes, seen on stand-ins.

    What is kept may depend on a weight's size, so the module with the largest has its true shapes;
    all others have one element.
    """
    largest = max(weights.values(), key=lambda pair: max(pair[0].numel(), pair[1].numel()))
    shapes: dict[int, tuple[int, ...]] = {id(w): (1, 1) for pair in weights.values() for w in pair}
    shapes |= {id(weight): tuple(weight.shape) for weight in largest}
    scratch = object.__new__(type(optimizer))
    vars(scratch).update(vars(optimizer))
    vars(scratch).pop("step", None)  # a scheduler's, which counts calls
    scratch.state = defaultdict(dict)
    scratch.param_groups = [
        {**group, "params": [_stand_in(param, shapes.get(id(param))) for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(scratch, hooks, OrderedDict())
    devices = {weight.device for weight in largest if weight.is_cuda}
    with torch.random.fork_rng(devices=devices):
        try:
            if hasattr(scratch, "train"):  # schedule-free ones have two modes, as modules have
                scratch.train()
            scratch.step()
        except Exception:  # it may want more than gradients; what it kept until then still tells
            return scratch.state
    return scratch.state


def _stand_in(param: nn.Parameter, shape: tuple[int, ...] | None) -> nn.Parameter:
    """A parameter of zeros with a gradient of zeros; without elements and gradient for no shape."""
    values = torch.zeros(shape or (0,), dtype=param.dtype, device=param.device)
    stand_in = nn.Parameter(values, requires_grad=param.requires_grad)
    if shape and param.requires_grad:
        stand_in.grad = torch.zeros_like(values)
    return stand_in
