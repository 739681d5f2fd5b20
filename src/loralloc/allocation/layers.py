"""Finding what can be allocated: PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from loralloc.allocation.experts import num_experts, parameter_name

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the backbone as it is."""


NOT_PLAIN = (
    *("use_dora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config", "megatron_config"),
)
"""Options of PEFT's `LoraConfig` that make an adapter more than B (A x)."""


def base_model(model: nn.Module) -> nn.Module:
    """The model that was adapted, whose module names PEFT's patterns are matched against."""
    model = getattr(model, "_orig_mod", model)  # under torch.compile
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def adapted_part(model: nn.Module) -> nn.Module:
    """The part of a model that has the adapter: all of it, or the one that was adapted inside.

    A trainer's model may hold the adapted one, as an encoder of sentences does, or a module of
    Lightning's.

    Raises:
        TypeError: Several of its parts have an adapter each.
    """
    if getattr(model, "peft_config", None):
        return model
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in found)
        if not within and isinstance(getattr(module, "peft_config", None), dict):
            found[name] = module
    if len(found) > 1:
        raise TypeError(
            f"Several parts of the model have an adapter ({', '.join(found)}), and ranks move "
            "within one; adapt one of them."
        )
    return next(iter(found.values()), model)


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that the model's LoRA layers use now, "default" where it has none.

    Raises:
        ValueError: They use several.
    """
    layers = (module for module in base_model(model).modules() if isinstance(module, LoraLayer))
    active: list[str] = next((list(layer.active_adapters) for layer in layers), ["default"])
    if len(active) != 1:
        raise ValueError(
            f"The adapters {', '.join(map(repr, active))} are active at once, and ranks move "
            "within one; say which with `adapter_name=`."
        )
    return active[0]


def lora_config(model: nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The LoRA configuration of an adapter.

    Raises:
        TypeError: The model has no LoRA adapter of that name.
    """
    configs = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter_name)
    if not isinstance(config, LoraConfig):
        found = ", ".join(f"{k!r} ({v.peft_type.value})" for k, v in configs.items()) or "none"
        lora = [name for name, other in configs.items() if isinstance(other, LoraConfig)]
        cure = (
            f"pass `adapter_name={lora[0]!r}`."
            if lora
            else "wrap it with `peft.get_peft_model(model, LoraConfig(...))` first."
        )
        raise TypeError(
            f"The model has no LoRA adapter named {adapter_name!r} (adapters found: {found}); "
            f"{cure}"
        )
    return config


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """The layers whose rank can be changed, by their name in the base model, in model order.

    Experts that are one parameter are named by it; see `allocation/experts.py`.

    Raises:
        TypeError: The adapter has a part that rank allocation is not defined for.
    """
    config = lora_config(model, adapter_name)
    if config.init_lora_weights not in PLAIN_INITS:
        raise TypeError(
            f"The adapter has `init_lora_weights={config.init_lora_weights!r}`, which changes the "
            "backbone by the ranks it begins with: with other ranks the saved adapter would open "
            "wrong; leave the option out."
        )
    for option in NOT_PLAIN:
        if getattr(config, option, None):
            raise _not_plain(f"`{option}`")
    layers = {}
    for name, module in base_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name in module.lora_variant:
            raise _not_plain(type(module.lora_variant[adapter_name]).__name__)
        if module.merged:
            raise ValueError(
                f"The adapter is merged into {name}; call `model.unmerge_adapter()` before its "
                "ranks are measured or changed."
            )
        has_linear = adapter_name in module.lora_A and isinstance(
            module.lora_A[adapter_name], nn.Linear
        )
        if not has_linear and adapter_name in (*module.lora_A, *module.lora_embedding_A):
            raise TypeError(
                f"{name} is a {type(module.get_base_layer()).__name__}; ranks can be allocated on "
                "linear layers only (Linear, Conv1D and their quantised forms); leave it out of "
                "`target_modules`."
            )
        if has_linear:
            wraps = isinstance(module, ParamWrapper)
            layers[parameter_name(name, module) if wraps else name] = module
    return layers


def _not_plain(what: str) -> TypeError:
    return TypeError(
        f"The adapter uses {what}, for which ranks cannot be allocated: scoring and resizing are "
        "defined for plain LoRA, B (A x); leave it out."
    )


def has_own_bias(layer: LoraLayer, config: LoraConfig) -> bool:
    """Whether a bias trains with the layer that PEFT saves and finds by the layer's ranks alone."""
    return config.bias == "lora_only" and getattr(layer.get_base_layer(), "bias", None) is not None


def weight_a(layer: LoraLayer, adapter_name: str = "default") -> nn.Parameter:
    """A_m, shape (num_ranks, in_features), of E experts (E num_ranks, in_features)."""
    return cast(nn.Parameter, layer.lora_A[adapter_name].weight)


def weight_b(layer: LoraLayer, adapter_name: str = "default") -> nn.Parameter:
    """B_m, shape (out_features, num_ranks), of E experts (out_features, E num_ranks)."""
    return cast(nn.Parameter, layer.lora_B[adapter_name].weight)


def weights_b(layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> dict[str, Tensor]:
    """B_m of every module."""
    return {name: weight_b(layer, adapter_name) for name, layer in layers.items()}


def weights_ab(
    layers: Mapping[str, LoraLayer], adapter_name: str = "default"
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A_m and B_m of every module."""
    return {
        name: (weight_a(layer, adapter_name), weight_b(layer, adapter_name))
        for name, layer in layers.items()
    }


def experts_of(layers: Mapping[str, LoraLayer]) -> dict[str, int]:
    """How many experts each of the modules has whose ranks are those of several."""
    return {name: count for name, layer in layers.items() if (count := num_experts(layer)) > 1}


def rank_cost(layer: LoraLayer) -> int:
    """Parameters of one rank: a row of A and a column of B, of every expert where it has some."""
    return num_experts(layer) * (int(layer.in_features) + int(layer.out_features))


def ranks(layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> dict[str, int]:
    """The rank of every module now."""
    return {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
