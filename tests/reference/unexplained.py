"""What of dL/dW a module's ranks do not explain, with dL/dW made and taken apart in full."""

import torch
from torch import Tensor

from loralloc.allocation.layers import lora_layers


def gradients(model, batch) -> dict[str, Tensor]:
    """dL/dW of every adapted layer, (out, in), of the loss that the model itself reports."""
    weights = {}
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight
        weights[name] = weight.requires_grad_()
    found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {
        # Conv1D keeps its weight as (in, out).
        name: g.t() if type(lora_layers(model)[name].get_base_layer()).__name__ == "Conv1D" else g
        for name, g in zip(weights, found, strict=True)
    }


def outside(gradient: Tensor, rows: Tensor) -> Tensor:
    """G P: what of G reads nothing of the span of the rows of A."""
    identity = torch.eye(rows.shape[1])
    return gradient @ (identity - rows.t() @ torch.linalg.pinv(rows @ rows.t()) @ rows)


def buy(available, ranks, worth, cost, max_rank=None):
    """Rank after rank to the module whose next is worth most a unit of its cost."""
    modules = list(ranks)
    given = dict.fromkeys(modules, 0)
    while True:
        best, best_name = None, None
        for name in modules:
            position = given[name]
            if position >= len(worth.get(name, [])) or cost.get(name, 1) > available:
                continue
            if max_rank is not None and ranks[name] + position >= max_rank:
                continue
            value = worth[name][position] / cost.get(name, 1)
            if best is None or value > best:
                best, best_name = value, name
        if best_name is None:
            return given, available
        given[best_name] += 1
        available -= cost.get(best_name, 1)
