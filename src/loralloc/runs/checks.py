"""What libraries would find out late, told before anything is loaded or trained.

Trainer finds out at the first evaluation that nothing computes a measure, and when training begins
that a schedule or an optimiser cannot be made as it was asked for; Transformers names a missing
package when it first imports it, and draws weights that a checkpoint lacks at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

    from loralloc.methods.method import Method
    from loralloc.runs.heads.head import Head
    from loralloc.runs.settings import Settings

LOSS = "loss"
PREFIX = "eval_"
"""What Trainer's names of measures may begin with."""

HOOKED = ("layerwise", "lomo")
"""Parts of the names of optimisers that hang on the model as soon as they are made."""

COMPARING = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the evaluations."""


def check_measure(settings: Settings, head: Head) -> None:
    """Refuse a measure that this run's evaluations do not give, or compare the wrong way round.

    Raises:
        ValueError: Naming the measures that there are.
    """
    args = settings.training
    compares = args.load_best_model_at_end or args.save_strategy == "best"
    if not compares and args.lr_scheduler_type not in COMPARING:
        return
    name = (args.metric_for_best_model or LOSS).removeprefix(PREFIX)
    measures = {LOSS: False} if args.prediction_loss_only else head.measures
    if name not in measures:
        only = " with `prediction_loss_only`" if args.prediction_loss_only else ""
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, which no evaluation of "
            f"the {head.name} head computes{only}; use {' or '.join(measures)}."
        )
    if settings.gives("greater_is_better") and args.greater_is_better != measures[name]:
        way = "greater" if measures[name] else "smaller"
        raise ValueError(
            f"`greater_is_better` is {args.greater_is_better}, but a {way} `{name}` is better; "
            "leave it out."
        )
    _check_evaluations(settings)


def check_optimizer(settings: Settings) -> None:
    """Refuse an optimiser and a schedule of the learning rate that cannot be made.

    Raises:
        ValueError: Naming the options, with the reason.
    """
    import torch
    from transformers import Trainer, get_scheduler

    args = settings.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`optim` {args.optim.value!r} cannot be made with `optim_args` {args.optim_args!r}: "
            f"{_reason(error)}."
        ) from error
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=dummy,
            num_warmup_steps=1,
            num_training_steps=max(args.max_steps, 2),
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`lr_scheduler_type` {args.lr_scheduler_type.value!r} cannot be made with "
            f"`lr_scheduler_kwargs` {args.lr_scheduler_kwargs!r}: {_reason(error)}."
        ) from error


def check_followed(trainer: Trainer, method: Method) -> None:
    """Refuse an optimiser under which the method cannot change weights.

    Raises:
        TypeError: Naming what it keeps of each weight.
    """
    from loralloc.allocation.optimizer_state import bare_optimizer
    from loralloc.methods.method import Method

    takes_any = type(method).check_optimizer is Method.check_optimizer
    is_made = trainer.optimizer is not None
    if takes_any or is_made or any(name in trainer.args.optim for name in HOOKED):
        return
    try:
        method.check_optimizer(bare_optimizer(trainer.create_optimizer()))
    finally:
        trainer.optimizer = None  # training makes it, in the method's groups


def _check_evaluations(settings: Settings) -> None:
    """Refuse evaluations that all come too late to choose by."""
    args = settings.training
    unit, ends = "steps", float("inf")  # known without the data only where they are given
    if args.eval_strategy == "steps" and args.max_steps > 0:
        ends = args.max_steps
    elif args.eval_strategy == "epoch" and args.max_steps <= 0:
        unit, ends = "epochs", args.num_train_epochs
    if args.eval_delay > ends:
        raise ValueError(
            f"`eval_delay` is {args.eval_delay:g}, and the run ends after {ends:g} {unit}, so that "
            "no evaluation takes place to choose by; lower it."
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


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


POOLER = "pooler"
"""What some encoders read a text's first token with: a checkpoint of masked language modelling has
none, so that it is a part of a new head."""

MOST_NAMED = 4
"""Weights that a message names."""


def check_weights(
    name: str, model: Any, loading: Mapping[str, Any], *, head_is_new: bool
) -> list[str]:
    """Refuse a model whose weights are not all its checkpoint's: the others are drawn at random.

    Args:
        name: What the user calls the model.
        model: The model, loaded.
        loading: What `from_pretrained` says of it: `missing_keys` and `mismatched_keys`.
        head_is_new: Whether the weights behind the backbone may be missing.

    Returns:
        The modules of the head that are new.

    Raises:
        ValueError: A weight is missing or has another shape.
    """
    inside = f"{model.base_model_prefix}."
    missing = sorted(loading["missing_keys"])
    new = [key for key in missing if not key.startswith(inside) or POOLER in key.split(".")]
    lost = [key for key in missing if not head_is_new or key not in new]
    if lost:
        raise ValueError(
            f"{name} lacks weights of a {type(model).__name__}, which would stay as they are drawn "
            f"at random: {_named(lost)}; use a checkpoint that was saved with them."
        )
    if loading["mismatched_keys"]:
        shapes = [
            f"{key} is {tuple(found)} and not {tuple(wanted)}"
            for key, found, wanted in sorted(loading["mismatched_keys"])
        ]
        raise ValueError(
            f"{name} holds weights of other shapes than a {type(model).__name__} has here: "
            f"{_named(shapes)}; use a checkpoint of this model with as many labels, or one without "
            "a head."
            if head_is_new
            else f"{name} holds weights of other shapes than its config.json describes: "
            f"{_named(shapes)}; use the files of one checkpoint."
        )
    return sorted({key.rpartition(".")[0] for key in new})


def _named(items: list[str]) -> str:
    more = len(items) - MOST_NAMED
    return ", ".join(items[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


OWN_OPTIONS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
    "quantization_config": "load_in_4bit",
    **dict.fromkeys(("num_labels", "id2label", "label2id", "config", "state_dict"), ""),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes"), ""),
}
"""Arguments of `from_pretrained` that a run gives, and the options that they follow from."""


def checked_model_arguments(more: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The arguments, once it is known that none has an option of its own.

    Raises:
        ValueError: One has, or they are no mapping.
    """
    if isinstance(more, str) and more.lstrip().startswith("{"):  # as a flag gives it
        more = json.loads(more)
    if not isinstance(more, Mapping | None):
        raise ValueError(
            f"`model_init_kwargs` is {more!r:.60}; it must be a mapping of arguments, such as "
            '`{"use_kernels": true}`.'
        )
    for name in more or {}:
        if name in OWN_OPTIONS:
            use = OWN_OPTIONS[name]
            raise ValueError(
                f"`model_init_kwargs` has {name!r}, which "
                + (f"has an option of its own; use `--{use}`." if use else "a run sets itself.")
            )
    return dict(more or {})
