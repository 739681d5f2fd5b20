"""Eq. 6 of Liu et al. 2024 as it is printed: gates, and one whole forward pass for every S(.).

Nothing is shared, skipped or restored: a gate multiplies the output of a lora_A, as in eq. 3,

    y = W0 x + s * B (g * (A x))

and S(.) is minus the loss that the model itself reports on the scoring batch.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from loralloc.allocation.layers import lora_layers

Gates = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The values of S that eq. 6 is made of: by module, a tensor of shape (num_ranks,)."""

    s_full: float
    s_base: float
    s_without: dict[str, Tensor]
    s_only: dict[str, Tensor]

    @property
    def importance(self) -> dict[str, Tensor]:
        """IS(r) = S(M) - S(M without r) + S(M with only r), eq. 6."""
        return {
            name: self.s_full - self.s_without[name] + self.s_only[name] for name in self.s_without
        }


def performance(model, batch, gates: Gates) -> Tensor:
    """S(.): minus the model's own loss with these gates."""
    with ExitStack() as hooks:
        for name, layer in lora_layers(model).items():
            hook = layer.lora_A["default"].register_forward_hook(_multiply_by(gates[name]))
            hooks.callback(hook.remove)
        return -model(**batch).loss


def _multiply_by(gate: Tensor):
    return lambda _module, _inputs, output: output * gate


def gates_all(model, value: float, dtype=torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.full((layer.r["default"],), value, dtype=dtype)
        for name, layer in lora_layers(model).items()
    }


@torch.no_grad()
def ablation(model, batch) -> Terms:
    """Every S(.) of eq. 6, by 2R + 2 forward passes."""
    without: dict[str, list[float]] = {}
    only: dict[str, list[float]] = {}
    for name, gate in gates_all(model, 1.0).items():
        without[name], only[name] = [], []
        for rank in range(len(gate)):
            all_but_one = gates_all(model, 1.0)
            all_but_one[name][rank] = 0.0
            without[name].append(float(performance(model, batch, all_but_one)))
            one_alone = gates_all(model, 0.0)
            one_alone[name][rank] = 1.0
            only[name].append(float(performance(model, batch, one_alone)))
    return Terms(
        s_full=float(performance(model, batch, gates_all(model, 1.0))),
        s_base=float(performance(model, batch, gates_all(model, 0.0))),
        s_without={name: torch.tensor(values) for name, values in without.items()},
        s_only={name: torch.tensor(values) for name, values in only.items()},
    )


def gate_derivatives(model, batch, value: float) -> dict[str, Tensor]:
    """dS/dg of every rank with all gates at `value`, by autograd through the gates themselves."""
    gates = {name: gate.requires_grad_() for name, gate in gates_all(model, value).items()}
    gradients = torch.autograd.grad(performance(model, batch, gates), list(gates.values()))
    return dict(zip(gates, gradients, strict=True))
