"""An adapter folder of PEFT's, ours or anybody's: its modules, ranks and scalings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loralloc.adapters.stranger import check_config
from loralloc.allocation.files import read_json, read_tensors

CONFIG = "adapter_config.json"
"""PEFT's description of an adapter."""

WEIGHTS = "adapter_model.safetensors"
"""Its tensors."""

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

NOT_PLAIN = (
    *("use_dora", "use_bdlora", "use_qalora", "lora_bias", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config", "megatron_config"),
    *("target_parameters", "trainable_token_indices", "layer_replication"),
)
"""Options of PEFT's `LoraConfig` that make an adapter more than scaling * B (A x) on modules."""

PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the backbone as it is."""

_TENSOR = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<which>[AB])\.weight$")


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """What an adapter adds to one module: scaling * B (A x)."""

    a: Tensor
    """Shape (num_ranks, in_features)."""

    b: Tensor
    """Shape (out_features, num_ranks)."""

    scaling: float
    """As PEFT has it: alpha / r, or alpha / sqrt r with rsLoRA, after the patterns."""

    declared_rank: int
    """The rank that the configuration says."""

    @property
    def rank(self) -> int:
        """The rank that the tensors have."""
        return int(self.a.shape[0])

    def delta(self) -> Tensor:
        """What is added to the weight, shape (out_features, in_features), in float32."""
        return self.scaling * (self.b.float() @ self.a.float())


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The content of an adapter folder."""

    path: Path
    """The folder."""

    config: Mapping[str, Any]
    """Its `adapter_config.json`."""

    modules: Mapping[str, LoraModule]
    """By the module's full name in the backbone."""

    others: Mapping[str, Tensor]
    """All other tensors by their names in the file: of whole modules, biases, experts that are one
    parameter."""

    parameters: Sequence[str] = ()
    """Full names of the parameters that ranks are on, a mixture's experts and routers, by which
    PEFT's patterns find them."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def is_more_than_lora(self) -> bool:
        """Whether it holds anything beside ranks on modules, or changes the backbone."""
        init = self.config.get("init_lora_weights", True)
        has_options = any(self.config.get(name) for name in NOT_PLAIN)
        return has_options or init not in PLAIN_INITS or bool(self.others or self.parameters)

    def check_plain(self, why: str = "this form cannot hold it; use `--to merged`") -> None:
        """Refuse what cannot be written as scaling * B (A x) on modules.

        Args:
            why: What that means for what is being done, and what to do instead.

        Raises:
            ValueError: Naming the option or tensor.
        """
        found = [f"`{name}`" for name in NOT_PLAIN if self.config.get(name)]
        init = self.config.get("init_lora_weights", True)
        if init not in PLAIN_INITS:
            found.append(f"`init_lora_weights={init!r}`, which changes the backbone")
        found += [name for name in self.others if ".lora_" in name]
        if found:
            raise ValueError(
                f"The adapter in {self.path} has {found[0]}, so it is more than LoRA's B (A x) on "
                f"linear layers, and {why}."
            )
        for name, module in self.modules.items():
            if module.rank != module.declared_rank:
                raise ValueError(
                    f"{name} has {module.rank} ranks in {self.path / WEIGHTS} and "
                    f"{module.declared_rank} by {CONFIG}, so PEFT cannot load the adapter; save it "
                    "anew."
                )


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that PEFT wrote for LoRA.

    Raises:
        ValueError: It holds no LoRA adapter, or one whose tensors do not fit together.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}, so no adapter of PEFT's; name a folder that has one."
        )
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"The adapter in {folder} is {kind!r:.60} to PEFT, and only 'LORA' has ranks that can "
            "be exported, linted or resized; of others, merge what PEFT can merge."
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS}; save the adapter with PEFT's `save_pretrained`."
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        found = _TENSOR.match(key)
        if found and tensor.ndim == 2:
            pairs.setdefault(found["name"], {})[found["which"]] = tensor
        else:
            others[key] = tensor
    _check_pairs(folder, pairs)
    check_config(config, list(pairs), where=str(folder / CONFIG))
    parameters, held = _on_parameters(config, pairs)
    for name in held:
        pair = pairs.pop(name)
        others |= {f"{PREFIX}{name}.lora_{which}.weight": pair[which] for which in pair}
    modules = {}
    for name, pair in pairs.items():
        rank, scaling = declared(config, name)
        modules[name] = LoraModule(a=pair["A"], b=pair["B"], scaling=scaling, declared_rank=rank)
    return Adapter(
        path=folder, config=config, modules=modules, others=others, parameters=parameters
    )


def _on_parameters(config: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The parameters that `target_parameters` names, and the modules whose tensors are theirs.

    PEFT calls the tensors of a parameter by the module that has it, with `base_layer` behind for
    every further one of the same module.
    """
    parameters: dict[str, None] = {}
    held = []
    for name in names:
        module = name.replace(".base_layer", "")
        for target in config.get("target_parameters") or ():
            owner, _, own = str(target).rpartition(".")
            # A name alone is one that PEFT has made of the name of a linear layer of old.
            if f".{module}".endswith(f".{owner}" if owner else ".experts"):
                parameters[f"{module}.{own}"] = None
                held += [name] * (name not in held)
    return list(parameters), held


def declared(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """The rank and the scaling that PEFT gives a module.

    Rank and alpha are looked up on their own: the first key of a pattern that matches the end of
    the name, as a regular expression, wins.

    Raises:
        ValueError: A number or a pattern is none.
    """
    ranks, alphas = patterns(config)
    rank = ranks.get(matching(ranks, name), config.get("r", 8))
    alpha = alphas.get(matching(alphas, name), config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{CONFIG} gives {name} the rank {rank!r} and the alpha {alpha!r}; they must be "
            "numbers, and the rank at least 1."
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def patterns(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rank_pattern` and `alpha_pattern`, empty where there are none.

    Raises:
        ValueError: One is no object.
    """
    found = []
    for option in ("rank_pattern", "alpha_pattern"):
        value = config.get(option) or {}
        if not isinstance(value, dict):
            raise ValueError(f"`{option}` is a {type(value).__name__}; it must be an object.")
        found.append(value)
    return found[0], found[1]


def matching(keys: Iterable[str], name: str) -> str:
    """The key of a pattern that PEFT takes for a module; the name itself where none matches.

    Raises:
        ValueError: A key is no regular expression.
    """
    for key in keys:
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return key
        except re.error as error:
            raise ValueError(
                f"{key!r} in a pattern of {CONFIG} is no regular expression ({error})."
            ) from None
    return name


def anchored(name: str) -> str:
    """A key that PEFT matches with this module only."""
    return "^" + re.escape(name)


def _check_pairs(folder: Path, pairs: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not pairs:
        raise ValueError(f"{folder / WEIGHTS} has no tensors of LoRA; name another adapter.")
    for name, pair in pairs.items():
        fits = len(pair) == 2 and pair["A"].shape[0] == pair["B"].shape[1] > 0
        if not fits:
            raise ValueError(
                f"lora_A and lora_B of {name} in {folder / WEIGHTS} do not fit together; save the "
                "adapter anew."
            )
