"""An adapter as it was, to come back to: its ranks, its weights, and what its optimiser keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.experts import num_experts, put_in_place
from loralloc.allocation.layers import (
    base_model,
    lora_config,
    lora_layers,
    weight_a,
    weight_b,
)
from loralloc.allocation.optimizer_state import bare_optimizer, check_shapes
from loralloc.allocation.resize import write_patterns

TARGETED = ("exclude_modules", "target_parameters")
"""Options of PEFT's configuration that change where a module loses its last rank."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A LoRA layer, with what it gives up where it loses its last rank."""

    layer: LoraLayer
    linear_a: Any
    linear_b: Any
    dropout: nn.Module
    rank: int
    alpha: float
    scaling: float
    path: str
    """Where it is in the base model."""

    name_a: str
    """Of the parameter A in the model."""

    name_b: str


@dataclass(kw_only=True)
class Snapshot:
    """What trains of a model, and what the optimiser keeps of it, by the names of parameters.

    Restoring brings back modules that have left the adapter since, with the very layers that the
    model had: nothing of the model is built anew.
    """

    adapter_name: str
    targeted: Mapping[str, Any]
    """What PEFT's configuration says of modules that have left the adapter."""

    layers: dict[str, _Layer]
    """By the module's name in the base model."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """Every parameter that trains."""

    groups: list[list[str]] = field(default_factory=list)
    """The parameters of each of the optimiser's groups, in order."""

    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The optimiser's state of each."""

    @classmethod
    def of_structure(cls, model: nn.Module, adapter_name: str = "default") -> Snapshot:
        """The model's LoRA layers as they are now; what is in them is to come from `load_state`."""
        names = {id(p): name for name, p in model.named_parameters()}
        paths = {id(module): path for path, module in base_model(model).named_modules()}
        return cls(
            adapter_name=adapter_name,
            targeted={
                option: copy.copy(getattr(lora_config(model, adapter_name), option))
                for option in TARGETED
            },
            layers={
                name: _Layer(
                    layer=layer,
                    linear_a=layer.lora_A[adapter_name],
                    linear_b=layer.lora_B[adapter_name],
                    dropout=layer.lora_dropout[adapter_name],
                    rank=layer.r[adapter_name],
                    alpha=layer.lora_alpha[adapter_name],
                    scaling=layer.scaling[adapter_name],
                    path=paths[id(layer)],
                    name_a=names[id(weight_a(layer, adapter_name))],
                    name_b=names[id(weight_b(layer, adapter_name))],
                )
                for name, layer in lora_layers(model, adapter_name).items()
            },
        )

    @classmethod
    def take(
        cls, model: nn.Module, optimizer: Optimizer | None, adapter_name: str = "default"
    ) -> Snapshot:
        """The model and the optimiser as they are now.

        Args:
            model: A PEFT model with a LoRA adapter.
            optimizer: What trains it, under wrappers or not.
            adapter_name: PEFT's name of the adapter.

        Raises:
            ValueError: The optimiser trains something that is no part of the model.
        """
        found = cls.of_structure(model, adapter_name)
        found.weights = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }
        bare = bare_optimizer(optimizer)
        if bare is None:
            return found
        names = {id(p): name for name, p in model.named_parameters()}
        for group in bare.param_groups:
            if any(id(p) not in names for p in group["params"]):
                raise ValueError(
                    "The optimiser trains a parameter that is no part of the model, so that a step "
                    "back to a larger adapter could not bring it back; give it the model's alone."
                )
            found.groups.append([names[id(p)] for p in group["params"]])
        found.moments = {names[id(p)]: _copied(state) for p, state in bare.state.items()}
        return found

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Bring back what was taken.

        Args:
            model: The same model, whose ranks may be fewer now.
            optimizer: What trains it; the new parameters take the places of the old ones.
        """
        self._restore_layers(model)
        parameters = dict(model.named_parameters())
        for name, values in self.weights.items():
            parameters[name].data.copy_(values)
        bare = bare_optimizer(optimizer)
        if bare is None:
            return
        bare.state.clear()
        for group, names in zip(bare.param_groups, self.groups, strict=True):
            group["params"] = [parameters[name] for name in names]
            if "param_names" in group:  # of an optimiser that was given named parameters
                group["param_names"] = list(names)
        for name, state in self.moments.items():
            bare.state[parameters[name]] = _copied(state, like=parameters[name])
        check_shapes(bare)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it, beside the ranks."""
        return {"weights": self.weights, "groups": self.groups, "moments": self.moments}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.weights, self.groups = dict(state["weights"]), list(state["groups"])
        self.moments = dict(state["moments"])

    def _restore_layers(self, model: nn.Module) -> None:
        """Give every module its layer and its rank again, with new parameters of the old shapes."""
        base, adapter = base_model(model), self.adapter_name
        for option, value in self.targeted.items():
            setattr(lora_config(model, adapter), option, copy.copy(value))
        for was in self.layers.values():
            layer: Any = was.layer
            for linear, weight in ((was.linear_a, was.name_a), (was.linear_b, was.name_b)):
                values = self.weights[weight].to(next(layer.get_base_layer().parameters()).device)
                linear.weight = nn.Parameter(values.clone())
            was.linear_a.out_features = was.linear_b.in_features = was.rank * num_experts(layer)
            layer.lora_A[adapter], layer.lora_B[adapter] = was.linear_a, was.linear_b
            layer.lora_dropout[adapter] = was.dropout
            layer.r[adapter], layer.lora_alpha[adapter] = was.rank, was.alpha
            layer.scaling[adapter] = was.scaling
            put_in_place(base, was.path, layer)
            layer.train(base.training)
        write_patterns(model, adapter)


def _copied(state: Mapping[str, Any], like: Tensor | None = None) -> dict[str, Any]:
    """An optimiser's state of a parameter, copied; moved to where that parameter is.

    Counts of steps stay where they are, which Adam keeps on the CPU.
    """
    return {
        key: (
            value.detach().clone()
            if like is None or value.ndim == 0
            else value.detach().clone().to(like.device)
        )
        if isinstance(value, Tensor)
        else copy.copy(value)
        for key, value in state.items()
    }
