"""Methods that PEFT has, or that end as one of its adapters, and the modules that they adapt."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralloc.allocation.blocks import block_linears, linear_names
from loralloc.methods.method import DEFAULT_RANK, Method, trainable
from loralloc.methods.restore import check_scaling, load_weights, restore_shapes

PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Heads that PEFT trains and saves with an adapter for classification or question answering."""


@dataclass(kw_only=True)
class PeftMethod(Method):
    """A method whose model is a `PeftModel`."""

    @abstractmethod
    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """PEFT's options; `heads` are those that PEFT does not save by itself."""

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        # PEFT saves its own heads as a whole; a part of one named as well would be saved twice.
        named = [head for head in heads if head.partition(".")[0] not in PEFT_HEADS]
        config = self.peft_config(model, task_type=task_type, heads=named)
        self.model = get_peft_model(model, config)
        return self.model

    def num_trained(self) -> int:
        """See `Method.num_trained`."""
        return sum(
            parameter.numel()
            for name, parameter in trainable(self.model).items()
            if "modules_to_save" not in name
        )

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`."""
        self.model.save_pretrained(folder, **options)

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        load_weights(self.model, folder)


@dataclass(kw_only=True)
class LoraShaped(PeftMethod):
    """A method on the low-rank updates of linear layers, which ends as stock PEFT LoRA."""

    rank: int | None = None
    """Ranks of every module, on average at the end; None for what the budget allows."""

    scale: float = 2.0
    """What the update is multiplied by: alpha / r of LoRA."""

    dropout: float = 0.0
    """Share of what a module reads that is set to 0 in training."""

    targets: Sequence[str] | str | None = None
    """Modules to adapt, as PEFT's `target_modules`; None for every linear layer of every block."""

    size: ClassVar[str] = "rank"

    def targeted(self, model: nn.Module) -> Sequence[str] | str:
        """The modules to adapt, as PEFT's `target_modules`."""
        return resolve_targets(model, self.targets)

    def lora_options(self) -> dict[str, Any]:
        """What PEFT's options have beyond those of plain LoRA."""
        return {}

    def rank_cost(self, model: nn.Module) -> int:
        """Parameters of one rank of LoRA on all that is adapted."""
        return rank_parameters(model, self.targeted(model))

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        return size * self.rank_cost(model)

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        options = self.lora_options()
        return self.lora_config(model, self.rank, task_type=task_type, heads=heads, **options)

    def lora_config(
        self, model: Any, rank: int, *, task_type: TaskType, heads: Sequence[str], **more: Any
    ) -> LoraConfig:
        """PEFT's options of plain LoRA with so many ranks in every module."""
        return LoraConfig(
            r=rank,
            lora_alpha=_whole(self.scale * rank),
            lora_dropout=self.dropout,
            target_modules=self.targeted(model),
            modules_to_save=list(heads) or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type=task_type,
            **more,
        )

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`."""
        check_scaling(self.model, folder)

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        restore_shapes(self.model, folder)
        super().load(folder)

    def merge(self) -> Any:
        """See `Method.merge`."""
        return self.model.merge_and_unload()


@dataclass(kw_only=True)
class FixedRanks(LoraShaped):
    """A variant of LoRA that PEFT has, whose ranks cannot be changed once it is made."""

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`."""
        saved, now = PeftConfig.from_pretrained(str(folder)), self.model.peft_config["default"]
        for option in ("r", "lora_alpha", "use_dora", "init_lora_weights"):
            before, after = getattr(saved, option, None), getattr(now, option)
            if before != after:
                raise ValueError(
                    f"The run in {folder} began with `{option}` of {before}, and now it is "
                    f"{after}; resume with the value it began with."
                )

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        PeftMethod.load(self, folder)


def default_budget(model: nn.Module) -> int:
    """Parameters of LoRA with 8 ranks on every linear layer of every block."""
    return DEFAULT_RANK * rank_parameters(model, resolve_targets(model, None))


def rank_parameters(model: nn.Module, targets: Sequence[str] | str) -> int:
    """Parameters of one rank in every targeted module, as PEFT would match the targets."""
    return sum(sum(shape) for shape in targeted_shapes(model, targets).values())


def targeted_shapes(model: nn.Module, targets: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """Input and output features of every targeted linear layer, by name."""
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    _maybe_include_all_linear_layers(config, model)
    return {
        name: (module.in_features, module.out_features)
        if isinstance(module, nn.Linear)
        else tuple(module.weight.shape)  # Conv1D: (in, out)
        for name, module in model.named_modules()
        if check_target_module_exists(config, name)
    }


def _whole(alpha: float) -> float:
    """As PEFT writes it: a whole number without its decimal point."""
    return int(alpha) if float(alpha).is_integer() else alpha


def resolve_targets(model: nn.Module, wanted: Sequence[str] | str | None) -> list[str] | str:
    """What PEFT's `target_modules` should be, with every name checked.

    Args:
        model: The backbone, not yet adapted.
        wanted: Names or endings of names; one string is "all-linear" or a regular expression, as
            in PEFT; None for all linear layers of every block that PEFT can adapt.

    Raises:
        ValueError: A name matches no linear layer, or PEFT would adapt parameters by it.
    """
    if wanted is None:
        return _plain_linears(model)
    targets = _checked(model, wanted)
    experts = _experts_named(model, targets)
    if experts:
        raise ValueError(
            f"`lora_target_modules` is {wanted!r}, by which PEFT would adapt the experts of the "
            f"{type(model).__name__} too ({experts}), which are parameters; name parameters in "
            f"`lora_target_parameters`, and here use {', '.join(_plain_linears(model))}."
        )
    return targets


def _experts_named(model: nn.Module, targets: Sequence[str] | str) -> str:
    """The experts that PEFT would adapt by these names of modules, for people; "" for none."""
    try:
        return ", ".join(sorted(_as_peft_reads(model, targets).target_parameters or ()))
    except ValueError as error:  # it names one of two layers that are one parameter now
        return str(error).rstrip(".")


def _plain_linears(model: nn.Module) -> list[str]:
    """The linear layers of every block, without those whose names PEFT takes for experts'."""
    names = block_linears(model)
    left = _as_peft_reads(model, names).target_modules or ()
    return [name for name in names if name in left]


def _as_peft_reads(model: nn.Module, targets: Sequence[str] | str) -> LoraConfig:
    """PEFT's configuration once it has made names of modules into names of parameters.

    Since Transformers 5 all experts of a block are one parameter, and PEFT reads the names of the
    linear layers that they once were, wherever in the model these occur, as names of it.
    """
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    convert_peft_config_for_transformers(config, model, None)
    return config


def _checked(model: nn.Module, wanted: Sequence[str] | str) -> list[str] | str:
    for target in [wanted] if isinstance(wanted, str) else wanted:
        if "," in target and re.fullmatch(r"[\w.,\s]+", target):
            raise ValueError(
                f"`lora_target_modules` names {target!r}, and commas separate nothing there; put "
                f"blanks between the names: {' '.join(target.replace(',', ' ').split())}."
            )
    if isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted):
        wanted = [wanted]  # TRL's ModelConfig makes a string of a list of one
    if isinstance(wanted, str) or list(wanted) == ["all-linear"]:
        return wanted if isinstance(wanted, str) else "all-linear"
    names = linear_names(model)
    leaves = {name.rpartition(".")[2] for name in names}
    for target in wanted:
        if any(name == target or name.endswith("." + target) for name in names):
            continue
        near = get_close_matches(target, sorted(leaves | set(block_linears(model))), n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else (f"linear layers end in {', '.join(sorted(leaves))}.")
        )
        raise ValueError(f"`lora_target_modules` names {target!r}, which matches no module; {hint}")
    return list(wanted)
