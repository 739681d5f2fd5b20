"""Packages that values of options need and that are not installed with loralloc."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Need:
    """What some values of an option need."""

    option: str
    values: str
    """A regular expression for the values, as text."""

    package: str
    """As pip knows it."""

    modules: tuple[str, ...] = ()
    """Modules of which one has to be there; by default that of the package's name."""


NEEDS = (
    Need(option="load_in_4bit", values="True", package="bitsandbytes"),
    Need(option="load_in_8bit", values="True", package="bitsandbytes"),
    Need(option="use_liger_kernel", values="True", package="liger-kernel"),
    Need(option="deepspeed", values=r"(?!None$).+", package="deepspeed"),
    Need(
        option="attn_implementation",
        values="flash_attention_2",
        package="flash-attn",
        modules=("flash_attn", "kernels"),
    ),
    Need(
        option="attn_implementation",
        values="flash_attention_3",
        package="flash-attn-3",
        modules=("flash_attn_interface", "kernels"),
    ),
    Need(
        option="attn_implementation",
        values="flash_attention_4",
        package="flash-attn-4",
        modules=("flash_attn", "kernels"),
    ),
    Need(option="attn_implementation", values=".*/.*", package="kernels"),
    Need(
        option="optim",
        values="paged_.*|lion_.*|ademamix.*|adamw(_bnb)?_8bit|rmsprop_bnb.*",
        package="bitsandbytes",
    ),
    Need(option="optim", values="galore_.*", package="galore-torch"),
    Need(option="optim", values="apollo_.*", package="apollo-torch"),
    Need(option="optim", values="lomo|adalomo", package="lomo-optim"),
    Need(option="optim", values="grokadamw", package="grokadamw"),
    Need(option="optim", values="schedule_free_.*", package="schedulefree"),
    Need(option="optim", values="stable_adamw", package="torch-optimi", modules=("optimi",)),
    Need(option="optim", values="adamw_torch_[48]bit", package="torchao"),
    Need(option="optim", values="adamw_torch_xla", package="torch-xla"),
    Need(option="optim", values="adamw_torch_npu_fused", package="torch-npu"),
    Need(option="optim", values="adamw_anyprecision", package="torchdistx"),
    Need(
        option="report_to",
        values="tensorboard",
        package="tensorboard",
        modules=("tensorboard", "tensorboardX"),
    ),
    Need(
        option="report_to", values="azure_ml", package="azureml-mlflow", modules=("azureml.core",)
    ),
    Need(option="report_to", values="comet_ml", package="comet-ml"),
    Need(option="report_to", values="flyte", package="flytekit"),
    *(
        Need(option="report_to", values=name, package=name)
        for name in (
            *("mlflow", "neptune", "trackio", "wandb", "codecarbon", "clearml", "dagshub"),
            *("dvclive", "swanlab", "kubeflow"),
        )
    ),
)


def check_packages(given: Mapping[str, Any]) -> None:
    """Refuse values that need a package which is not there, before anything is loaded.

    Args:
        given: Options with their values.

    Raises:
        ValueError: Naming the option and the package.
    """
    for need in NEEDS:
        value = given.get(need.option)
        for one in value if isinstance(value, list | tuple) else [value]:
            if re.fullmatch(need.values, str(one)) and not _is_installed(need):
                raise ValueError(
                    f"`{need.option}` is {one!r}, which needs a package that is not installed: run "
                    f"`pip install {need.package}`, or leave the option out."
                )


def _is_installed(need: Need) -> bool:
    modules = need.modules or (need.package.replace("-", "_"),)
    return any(_is_found(module) for module in modules)


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that a submodule lies in
        return False
