"""Ranks of experts that are one parameter, written out expert by expert and rank by rank.

Expert e computes with W_e + s sum_k g_k b_ke a_ke^T, one gate g_k for rank k of all experts, where
row e r + k of PEFT's A is a_ke and column k E + e of its B is b_ke. Weights are made of these sums
and given to the backbone, which has no adapter then: no layer of PEFT's is called.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loralloc.allocation.layers import base_model, lora_layers

Gates = Mapping[str, Tensor]


def outer_products(layer, gates: Tensor, num_experts: int) -> list[Tensor]:
    """s sum_k g_k b_ke a_ke^T of every expert, shape (out_features, in_features)."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    num_ranks = len(gates)
    updates = []
    for e in range(num_experts):
        update = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
        for k in range(num_ranks):
            row, column = a[e * num_ranks + k], b[:, k * num_experts + e]
            update = update + gates[k] * torch.outer(column, row)
        updates.append(layer.scaling["default"] * update)
    return updates


def weights(model, gates: Gates) -> dict[str, Tensor]:
    """The weight of every adapted module, and the parameter of all experts, by the layer's name."""
    found = {}
    for name, layer in lora_layers(model).items():
        base, parameter = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        weight = getattr(base, parameter).detach()
        if weight.ndim == 2:
            found[name] = weight + outer_products(layer, gates[name], 1)[0]
        else:
            updates = outer_products(layer, gates[name], len(weight))
            found[name] = weight + torch.stack(updates)
    return found


def logits(model, batch, gates: Gates) -> Tensor:
    """What the backbone puts out with these weights."""
    return _run(model, batch, gates).logits


def performance(model, batch, gates: Gates) -> Tensor:
    """S(.): minus the backbone's own loss with these weights."""
    return -_run(model, batch, gates).loss


def _run(model, batch, gates: Gates):
    base, places = base_model(model), {}
    for name, module in base.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            places[f"{name}.{own}".replace(".base_layer", "")] = f"{name}.{own}"
    values = {}
    for name, weight in weights(model, gates).items():
        key = name if name in places else f"{name}.weight"
        values[places[key]] = weight
    with model.disable_adapter():
        return torch.func.functional_call(base, values, kwargs=dict(batch))


def gates_all(model, value: float) -> dict[str, Tensor]:
    return {
        name: torch.full((layer.r["default"],), value) for name, layer in lora_layers(model).items()
    }


def gate_derivatives(model, batch, value: float) -> dict[str, Tensor]:
    """dS/dg of every rank with all gates at `value`."""
    gates = {name: gate.requires_grad_() for name, gate in gates_all(model, value).items()}
    gradients = torch.autograd.grad(performance(model, batch, gates), list(gates.values()))
    return dict(zip(gates, gradients, strict=True))
