"""Changing the rank of LoRA layers in place, while an optimiser trains them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.config import NEW_STATES
from loralloc.allocation.experts import (
    num_experts,
    path_of,
    put_in_place,
    rank_norms,
    ranks_followed_by,
)
from loralloc.allocation.layers import (
    base_model,
    has_own_bias,
    lora_config,
    lora_layers,
    weight_a,
    weight_b,
    weights_ab,
)
from loralloc.allocation.new_rows import NewRows
from loralloc.allocation.optimizer_state import bare_optimizer, check_shapes, check_state, swap
from loralloc.allocation.policy import Plan
from loralloc.allocation.transfers import from_cpu


def resize(
    model: nn.Module,
    to: Plan | Mapping[str, int] | int,
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    new_state: Literal["zero", "survivors"] = "zero",
    new_rows: Mapping[str, NewRows] | None = None,
) -> Plan:
    """Change the ranks of a LoRA adapter, keeping its scaling and the optimiser's state.

    A module's A and B become new parameters of the new shapes. Ranks that stay keep their weights
    and their optimiser state; new ranks get a row of A that is Kaiming-uniform (a = sqrt 5), a
    column of B that is zero and no state, so that adding them does not change the function. The
    new parameters take the old ones' places in the optimiser's groups, so learning-rate
    schedulers go on as they were. `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` follow;
    a module left with no rank leaves the adapter.

    Args:
        model: A PEFT model, or a model with an injected LoRA adapter.
        to: A `Plan`; or a rank for every module; or ranks by module name (modules not named stay
            as they are), where those that shrink keep the ranks with the largest |B_i| |A_i|.
        optimizer: The optimiser that trains the adapter; without it new parameters would never
            train, so leave it out only where nothing trains.
        adapter_name: PEFT's name of the adapter.
        generator: Source of the new rows of A, on the CPU; PyTorch's own by default.
        new_state: What new ranks begin with in the optimiser's state: "zero", or "survivors" for
            what decides how large an update is (Adam's `exp_avg_sq`): its mean over the ranks of
            the module that stay. First moments are zero with both.
        new_rows: Rows of A that new ranks begin with in the place of drawn ones, by module; where
            there are fewer than new ranks, the others are drawn.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: A name is no adapted module, a rank is negative, all modules would be empty, or
            one whose bias PEFT would then not save; "survivors" without an optimiser; or rows
            that do not fit a module's new ranks.
        TypeError: The optimiser keeps state of which it is not known how it follows the ranks.
    """
    layers = lora_layers(model, adapter_name)
    plan = to if isinstance(to, Plan) else _plan_by_norm(layers, to, adapter_name)
    bare = bare_optimizer(optimizer)
    _check_new_state(new_state, bare)
    _check(layers, plan, bare, lora_config(model, adapter_name), adapter_name, new_state)
    _check_rows(layers, plan, new_rows or {})
    rows = _new_rows(layers, plan, new_rows or {}, adapter_name, generator)
    for name, kept in plan.kept.items():
        layer, added = layers[name], plan.added[name]
        if not added and len(kept) == layer.r[adapter_name]:
            continue
        old_a, old_b = weight_a(layer, adapter_name), weight_b(layer, adapter_name)
        begin = (new_rows or {}).get(name) if added else None
        experts = num_experts(layer)
        columns = old_b.new_zeros(old_b.shape[0], experts * added)
        new_a = _resized(old_a, kept, rows[name] if added else old_a[:0], experts, dim=0)
        new_b = _resized(old_b, kept, columns, experts, dim=1)
        if bare is not None:
            options: dict[str, Any] = {"experts": experts, "new_state": new_state}
            swap(bare, old_a, new_a, kept, added, dim=0, **options)
            sizes = _gradient_sizes(added, begin)
            swap(bare, old_b, new_b, kept, added, dim=1, gradient=sizes, **options)
        _set_rank(layer, new_a, new_b, adapter_name)
        if new_a.shape[0] == 0:
            _remove_from_adapter(model, name, layer, adapter_name)
    write_patterns(model, adapter_name)
    if bare is not None:
        check_shapes(bare)
    return plan


def write_patterns(model: nn.Module, adapter_name: str = "default") -> None:
    """Make `rank_pattern` and `alpha_pattern` say what the layers are, so that PEFT loads them.

    Keys are regular expressions of which PEFT takes the first match: each is the anchored, escaped
    full name, for the modules that differ from the configuration's `r` and `lora_alpha`.
    """
    config = lora_config(model, adapter_name)
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, layer in lora_layers(model, adapter_name).items():
        rank, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
        if (rank, alpha) != (config.r, config.lora_alpha):
            key = "^" + re.escape(name)
            config.rank_pattern[key] = rank
            config.alpha_pattern[key] = alpha


def _check(
    layers: Mapping[str, LoraLayer],
    plan: Plan,
    optimizer: Optimizer | None,
    config: LoraConfig,
    adapter_name: str,
    new_state: str,
) -> None:
    """Refuse what cannot be carried out, before anything is changed."""
    _check_names(layers, plan.kept)
    after = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    for name, kept in plan.kept.items():
        if len(set(kept)) < len(kept) or not all(0 <= i < after[name] for i in kept):
            raise ValueError(
                f"The plan keeps the ranks {list(kept)} of {name}, which has {after[name]}; "
                "indices go from 0 and come once each."
            )
        after[name] = plan.rank_after(name)
    if not any(after.values()):
        raise ValueError("Every module would be left with rank 0; keep at least one rank.")
    lost = [name for name, rank in after.items() if not rank and has_own_bias(layers[name], config)]
    if lost:
        raise ValueError(
            f"{lost[0]} would be left with rank 0, but the adapter has `bias='lora_only'`, with "
            "which PEFT saves a module's bias only beside its ranks; keep a rank of every module."
        )
    if optimizer is None:
        return
    chosen = weights_ab({name: layers[name] for name in plan.kept}, adapter_name)
    check_state(optimizer, chosen, new_state=new_state)


def _check_new_state(new_state: str, optimizer: Optimizer | None) -> None:
    if new_state not in NEW_STATES:
        raise ValueError(f"`new_state` is {new_state!r}; use one of 'zero', 'survivors'.")
    if new_state == "survivors" and optimizer is None:
        raise ValueError(
            "`new_state` is 'survivors', but there is no optimiser whose state new ranks could "
            "take over; pass `optimizer=`, or leave it out."
        )


def _check_names(layers: Mapping[str, LoraLayer], names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not an adapted module; names look like {next(iter(layers))!r}."
        )


def _plan_by_norm(
    layers: Mapping[str, LoraLayer], to: Mapping[str, int] | int, adapter_name: str
) -> Plan:
    """A plan that reaches the ranks and keeps the largest |B_i| |A_i|."""
    target = dict(to) if isinstance(to, Mapping) else dict.fromkeys(layers, to)
    _check_names(layers, target)
    kept, added, pruned = {}, {}, {}
    for name, wanted in target.items():
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
            raise ValueError(f"The rank of {name} is {wanted!r}; it must be a whole number from 0.")
        layer = layers[name]
        rank = int(layer.r[adapter_name])
        a, b = weight_a(layer, adapter_name).detach(), weight_b(layer, adapter_name).detach()
        sizes = rank_norms(a, b, num_experts(layer))
        order = torch.argsort(sizes, descending=True, stable=True)
        kept[name] = tuple(sorted(order[:wanted].tolist()))
        added[name] = max(0, wanted - rank)
        if wanted < rank:
            pruned[name] = tuple(sorted(order[wanted:].tolist()))
    return Plan(kept=kept, added=added, pruned=pruned)


def _check_rows(
    layers: Mapping[str, LoraLayer], plan: Plan, new_rows: Mapping[str, NewRows]
) -> None:
    for name, begin in new_rows.items():
        most = (plan.added.get(name, 0), int(layers[name].in_features) if name in layers else 0)
        shape = tuple(begin.rows.shape)
        if len(shape) != 2 or shape[1] != most[1] or shape[0] > most[0]:
            raise ValueError(
                f"`new_rows` has a tensor of shape {shape} for {name}, which gets {most[0]} new "
                f"ranks; give at most as many rows, of {most[1]} elements."
            )


def _new_rows(
    layers: Mapping[str, LoraLayer],
    plan: Plan,
    begins: Mapping[str, NewRows],
    adapter_name: str,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """New rows of A by module, shape (added, in_features): those that were found, then drawn ones.

    Of experts that are one parameter there are as many for each. All are drawn before any is sent
    to its device.
    """
    rows = {}
    for name in plan.kept:
        if not (added := plan.added[name]):
            continue
        width = weight_a(layers[name], adapter_name).shape[1]
        found = begins[name].rows.float().cpu() if name in begins else torch.empty(0, width)
        drawn = _kaiming_rows(num_experts(layers[name]) * added - len(found), width, generator)
        rows[name] = torch.cat([found, drawn])
    return from_cpu(rows, {name: weight_a(layers[name], adapter_name) for name in rows})


def _gradient_sizes(added: int, begin: NewRows | None) -> Tensor | None:
    """How large the gradients of new columns of B are, shape (added,), where it is known."""
    if begin is None:
        return None
    return torch.cat([begin.gradient, begin.gradient.new_ones(added - len(begin.gradient))])


def _kaiming_rows(num_rows: int, width: int, generator: torch.Generator | None) -> Tensor:
    """New rows of A, shape (num_rows, width): Kaiming-uniform with a = sqrt 5.

    Drawn on the CPU in float32, so that every device and process draws the same.
    """
    rows = torch.empty(num_rows, width, dtype=torch.float32, device="cpu")
    bound = 1 / math.sqrt(width)
    return rows.uniform_(-bound, bound, generator=generator)


def _resized(
    old: nn.Parameter, kept: tuple[int, ...], new: Tensor, experts: int, *, dim: int
) -> nn.Parameter:
    """The kept ranks of `old`, whose dimension is `dim`, then `new`; of each expert's, its own."""
    values = ranks_followed_by(kept, old.detach(), new.detach(), experts, dim=dim)
    return nn.Parameter(values.contiguous(), requires_grad=old.requires_grad)


def _set_rank(
    layer: LoraLayer, new_a: nn.Parameter, new_b: nn.Parameter, adapter_name: str
) -> None:
    """Give the layer its new weights and keep its scaling: alpha_m = s * r_m."""
    rank, scaling = new_a.shape[0] // num_experts(layer), layer.scaling[adapter_name]
    linear_a, linear_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    linear_a.weight, linear_a.out_features = new_a, new_a.shape[0]
    linear_b.weight, linear_b.in_features = new_b, new_b.shape[1]
    layer.r[adapter_name] = rank
    per_rank = math.sqrt(rank) if layer.use_rslora.get(adapter_name) else rank
    alpha = scaling * per_rank
    layer.lora_alpha[adapter_name] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _remove_from_adapter(model: nn.Module, name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Take an emptied module out of the adapter; PEFT refuses rank 0."""
    config = lora_config(model, adapter_name)
    if isinstance(layer, ParamWrapper):  # named one by one, since PEFT excludes modules only
        config.target_parameters = [
            other
            for other, held in lora_layers(model, adapter_name).items()
            if isinstance(held, ParamWrapper) and other != name
        ]
    elif isinstance(config.exclude_modules, str):
        config.exclude_modules = f"{config.exclude_modules}|(?:.*\\.)?{re.escape(name)}"
    else:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), name})
    for store in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        del store[adapter_name]
    for values in (layer.r, layer.lora_alpha, layer.scaling):
        values.pop(adapter_name)
    if not layer.lora_A:
        inner = layer.base_layer if isinstance(layer, ParamWrapper) else layer.get_base_layer()
        put_in_place(base_model(model), path_of(base_model(model), layer), inner)
