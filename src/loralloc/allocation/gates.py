"""Gates on single ranks while they are needed: y = W x + s B (g * (A x)).

The gates live outside the model, so that what is saved of it is plain LoRA at any time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.kernels.covered import RankGate

SCALED_WITH = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}
"""Adam's and SGD's state follow a gradient: where B becomes B g, it becomes that over g."""


def gate_ranks(
    model: nn.Module, gate: Callable[[str], Tensor], adapter_name: str = "default"
) -> list[RemovableHandle]:
    """Multiply every rank of a LoRA adapter by a gate, until the handles are removed.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        gate: From a module's name to its gates, shape (num_ranks,); called in every forward.
        adapter_name: PEFT's name of the adapter.
    """
    layers = lora_layers(model, adapter_name)
    return [
        layer.lora_A[adapter_name].register_forward_hook(RankGate(functools.partial(gate, name)))
        for name, layer in layers.items()
    ]


@torch.no_grad()
def fold_gates(
    model: nn.Module,
    gates: Mapping[str, Tensor],
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str = "default",
) -> None:
    """Put the gates' values into B, column by column, so that the function stays without them.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        gates: Values by module, shape (num_ranks,).
        optimizer: The optimiser that trains the adapter; its moments of B are scaled with B, and
            cleared where a gate is zero.
        adapter_name: PEFT's name of the adapter.
    """
    for name, layer in lora_layers(model, adapter_name).items():
        b = weight_b(layer, adapter_name)
        values = gates[name].detach().to(b)
        b.mul_(values)
        state = optimizer.state.get(b, {}) if optimizer is not None else {}
        for key, power in SCALED_WITH.items():
            if key in state:
                factor = torch.where(values == 0, torch.zeros_like(values), values.abs() ** power)
                state[key].mul_(factor * (values.sign() if power % 2 else 1))
