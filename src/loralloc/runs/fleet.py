"""Runs of one backbone that are trained at once, each as it would be alone.

Runs may differ in what the backbone and its batches know nothing of: seed, learning rate, rank,
LoRA or ALoRA with its options, optimiser and schedule. All is prepared, trained, evaluated, kept
and resumed by the code of a single run; see `training.fleet` for where they meet.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from loralloc.allocation.choices import is_gathered
from loralloc.allocation.layers import lora_layers
from loralloc.allocation.record import Round
from loralloc.runs.adaptation import method_of
from loralloc.runs.models import load_with_new_head
from loralloc.runs.prepared_rows import shared_rows
from loralloc.runs.run import Run, prepare
from loralloc.runs.run import train as train_run
from loralloc.runs.settings import Settings, resolve, resolve_again
from loralloc.training.dropout import dropout
from loralloc.training.fleet import Fleet, body_of
from loralloc.training.lockstep import World

METHODS = ("lora", "rslora", "lora-plus", "alora", "alora-sensi", "random", "inverse")
"""Methods that are plain LoRA in every step."""

MAY_DIFFER = (
    *("method", "budget", "lora_r", "lora_alpha", "use_rslora", "output_dir", "run_name"),
    *("seed", "data_seed", "learning_rate", "weight_decay", "max_grad_norm", "optim", "optim_args"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "early_stopping_patience"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
    *("method.rank", "method.scale", "method.use_rslora"),
)
"""Options in which the runs of a fleet may differ, beside those of the allocation."""

ALONE = {
    "lora_modules_to_save": "every run would need the modules of its own",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "the runs could not share the weights"),
    **dict.fromkeys(("bf16", "fp16"), "mixed precision is not carried through all runs at once"),
    **dict.fromkeys(("packing", "padding_free"), "rows are told apart by their place in a batch"),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "activation_offloading"),
        "it is switched on in each run's own model, through which the steps do not go",
    ),
    **dict.fromkeys(
        ("torch_compile", "use_liger_kernel", "cuda_graphs"), "it changes the run's own model alone"
    ),
    "neftune_noise_alpha": "its noise would be drawn for all runs at once",
    "auto_find_batch_size": "the batches of all runs have one size",
    **dict.fromkeys(("deepspeed", "fsdp"), "a fleet is one process"),
    "enable_jit_checkpoint": "signals reach the first thread of a process only",
}
"""Options with which a run is trained alone, and why."""


OF_LORA = {
    "dropout": "what it drops would be drawn for all runs at once",
    "use_dora": "a layer is B (A x) and no more",
    "parameters": "experts that are one parameter are not shared",
}
"""The same of LoRA's own options, however they are given."""

NOTHING: tuple[Any, ...] = (None, False, 0, 0.0, [], "", {})
"""Values with which an option does nothing."""


class FleetRuns:
    """Runs that are prepared one after another and trained at once.

    Example:
        >>> fleet = FleetRuns()  # doctest: +SKIP
        >>> for rate in (1e-3, 2e-3):
        ...     fleet.add({"task": "demo", "learning_rate": rate, ...})  # doctest: +SKIP
        >>> fleet.train()  # doctest: +SKIP
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.runs: list[Run] = []
        """The runs, in the order in which they were added."""
        self._backbone = SharedBackbone()
        self._rows: dict[str, Any] = {}
        self._worlds: list[World] = []

    def add(
        self,
        options: Settings | Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        on_round: Callable[[Round], None] | None = None,
    ) -> Run:
        """Prepare one more run; see `loralloc.prepare` for the arguments.

        Raises:
            ValueError: As `loralloc.prepare`, or the run has to be trained alone, or it differs
                from the others in more than it may; one sentence.
        """
        if isinstance(options, Settings):
            settings = options
        else:
            settings = resolve_again(options) if resume else resolve(options)
        check_settings(settings)
        with shared_rows(self._rows):
            run = prepare(
                settings, resume=resume, overwrite=overwrite, on_round=on_round, load=self._backbone
            )
        check_model(run.model)
        if self.runs:
            _check_alike(self.runs[0].settings, run.settings)
        self.runs.append(run)
        self._worlds.append(World())
        return run

    def train(self, carry_out: Callable[[Run], Any] = train_run) -> list[Any]:
        """Train all runs to their ends, and write their folders.

        Args:
            carry_out: A function of one run that trains it, and does with its trainer whatever is
                to be done then; `loralloc.train` by default.

        Returns:
            For each run what `carry_out` returned, or the exception that ended the run early. The
            others went on.
        """
        padding = self.runs[0].tokenizer.pad_token_id
        fleet = Fleet(
            [run.trainer for run in self.runs], padding=0 if padding is None else int(padding)
        )
        tasks = [functools.partial(carry_out, run) for run in self.runs]
        return fleet.run(tasks, self._worlds)


class SharedBackbone:
    """Loads a backbone for several runs: the frozen weights are there once.

    What a run draws at random, a new head, it draws as it would alone: such a model is loaded
    anew, and has then the weights that are there already.
    """

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._first: tuple[Any, list[str]] | None = None

    def __call__(self, name: str, **options: Any) -> tuple[Any, list[str]]:
        """See `models.load_with_new_head`."""
        if self._first is None:
            model, new = load_with_new_head(name, **options)
            self._first = _sharing(model), new
            return model, new
        first, new = self._first
        if not new:
            return _sharing(first), []
        model, new = load_with_new_head(name, **options)
        weights = dict(first.named_parameters(remove_duplicate=False))
        for where, module in model.named_modules():
            for own in module._parameters:
                full = f"{where}.{own}" if where else own
                if not any(full.startswith(f"{head}.") for head in new):
                    module._parameters[own] = weights[full]
        return model, new


def _sharing(model: Any) -> Any:
    """A copy of a model's modules around the same weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def check_settings(settings: Settings) -> None:
    """Refuse what cannot be held equal to a run alone.

    Raises:
        ValueError: Naming the option.
    """
    check_plain(settings, what="a fleet trains", otherwise="train it one by one")
    chosen = method_of(settings)
    values = {name: _value(settings, name) for name in ALONE}
    values |= {name: getattr(chosen, name, None) for name in OF_LORA}
    for name, value in values.items():
        if value not in NOTHING:
            raise ValueError(
                f"`{name}` is {value!r}, and in a fleet {(ALONE | OF_LORA)[name]}; leave it out or "
                "train one by one."
            )
    if settings.training.n_gpu > 1 or settings.training.world_size > 1:
        raise ValueError(
            "A fleet is one process on one device, and there are more; set CUDA_VISIBLE_DEVICES to "
            "one, or train one by one."
        )


def check_plain(settings: Settings, *, what: str, otherwise: str) -> None:
    """Refuse a method that is more than plain LoRA within a step.

    Args:
        settings: Of the run.
        what: What is to be done with its steps, for the sentence.
        otherwise: What can be done instead.

    Raises:
        ValueError: Naming the method, or the score that is gathered within passes.
    """
    method, allocation = settings.run.method, settings.allocation
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, and {what} {', '.join(METHODS)}; {otherwise}.")
    gathers = is_gathered(allocation) and allocation.score != "sensitivity"
    if method_of(settings).allocates and gathers:
        raise ValueError(
            f"`score` is {allocation.as_data()['score']!r}, which is gathered in forward passes of "
            f"a run's own model, and {what} what is not; {otherwise}."
        )


def check_model(model: Any) -> None:
    """Refuse a model in which the rows of several runs would not be what they are alone.

    Raises:
        ValueError: It draws dropout, adapts what is outside of the backbone's body, or is spread.
    """
    body = body_of(model)
    for name, option, rate in dropout(body):
        raise ValueError(
            f"{name or 'The backbone'} has dropout (`{option}` of {rate}), which is drawn for the "
            "rows of all runs at once, so that none would be as it is alone; switch it off in "
            "`model_init_kwargs`, or train one by one."
        )
    inside = {id(module) for module in body.modules()}
    outside = [name for name, layer in lora_layers(model).items() if id(layer) not in inside]
    if outside:
        raise ValueError(
            f"The adapter is on {outside[0]}, which is no part of the backbone's body that a fleet "
            "shares; leave it out of `lora_target_modules`, or train one by one."
        )
    if getattr(body.config, "output_router_logits", False):
        raise ValueError(
            "The backbone is a mixture of experts whose router has a loss (`output_router_logits`) "
            "on all rows of a batch, those of other runs among them; train one by one."
        )


def group_of(settings: Settings) -> str:
    """What the runs of a fleet have in common, as text to compare."""
    common = {
        name: value
        for name, value in settings.given.items()
        if name not in MAY_DIFFER and not name.startswith("allocation.")
    }
    return json.dumps(common, sort_keys=True, default=str)


def _check_alike(first: Settings, other: Settings) -> None:
    one, two = (json.loads(group_of(settings)) for settings in (first, other))
    for name in sorted({*one, *two}):
        if one.get(name) != two.get(name):
            raise ValueError(
                f"`{name}` is {two.get(name)!r} in one run of a fleet and {one.get(name)!r} in "
                "another; they may differ in seed, learning rate, rank, method and schedule."
            )


def _value(settings: Settings, name: str) -> Any:
    """What an option is; None where the installed TRL and Transformers have no such option."""
    groups = (settings.model, settings.training, settings.run)
    return next((getattr(group, name) for group in groups if hasattr(group, name)), None)
