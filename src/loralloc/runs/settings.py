"""All settings of a run, with where each came from: default, file, flag or an earlier run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from loralloc.allocation.config import AllocationConfig
from loralloc.runs.folder import SETTINGS

BLOCK = "allocation"
OPTIONS = "method"
"""What a method's own options begin with: `method.bottleneck`."""

DEFAULT = "loralloc default"
"""Source of a value that nobody gave."""
FOLLOWING = "as eval_steps"
"""Source of `save_steps` where checkpoints have to follow the evaluations."""


@dataclass
class RunArguments:
    """What a run needs beyond TRL's own arguments."""

    task: str | None = field(
        default=None,
        metadata={"help": "Task that turns rows into prompts and labels; see `loralloc.tasks`."},
    )
    method: str = field(
        default="alora",
        metadata={"help": "How the model is adapted; `loralloc methods` lists all."},
    )
    budget: int | None = field(
        default=None,
        metadata={
            "help": "Parameters that the method may add, which choose its size; by default those "
            "of LoRA with rank 8."
        },
    )
    paper: bool = field(
        default=False, metadata={"help": "The size that the method has in the paper's comparison."}
    )
    head: Literal["auto", "lm", "classification", "span"] = field(
        default="auto",
        metadata={"help": "Head of the model; auto: by the model and the task."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text to classify, without a task."}
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column with the second text of a pair, without a task."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the label, without a task."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that neighbouring windows of a long context share, with a span head; "
            "a quarter of `max_length` by default."
        },
    )
    validation_examples: int = field(
        default=100,
        metadata={"help": "Training examples held out where the data has no validation split."},
    )
    protocol: Literal["paper"] | None = field(
        default=None,
        metadata={"help": "paper: train, evaluate and stop as in its Appendix E; see the guide."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better one after which training stops."},
    )


DEFAULTS: dict[str, Any] = {
    "output_dir": None,
    "method": "alora",
    "model_name_or_path": "smollm2-135m",
    "dtype": None,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_peft": True,
    "learning_rate": 1e-4,
    "warmup_steps": 0.06,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": False,
    "bf16": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 10,
    "report_to": "none",
}
"""Where loralloc's defaults differ from TRL's: the paper's training (Appendix E), and a machine
without a GPU."""

GROUPS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, RunArguments)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Resolved settings in the classes that use them."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    run: RunArguments
    allocation: AllocationConfig

    given: Mapping[str, Any]
    """The values that are not TRL's defaults, flat, those of the allocation as `allocation.x`."""

    sources: Mapping[str, str]
    """Where each of the given values came from."""

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.training.output_dir)

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's own options that were given, without what they begin with."""
        start = OPTIONS + "."
        return {
            name.removeprefix(start): value
            for name, value in self.given.items()
            if name.startswith(start)
        }

    def gives(self, name: str) -> bool:
        """Whether this value comes from elsewhere than the defaults."""
        return self.sources.get(name, DEFAULT) not in (DEFAULT, FOLLOWING)

    def with_defaults(self, values: Mapping[str, Any], *, source: str) -> Settings:
        """These settings with other defaults; a value that was given stays."""
        new = {name: value for name, value in values.items() if not self.gives(name)}
        sources = {**self.sources, **dict.fromkeys(new, source)}
        return _build(_parser(), {**self.given, **new}, sources)

    def save(self) -> None:
        """Write `settings.json` into the run folder."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        data = {
            name: {"value": value, "source": self.sources[name]}
            for name, value in self.given.items()
        }
        text = json.dumps(data, indent=1, default=str)
        (self.output_dir / SETTINGS).write_text(text + "\n", encoding="utf-8")


def saved(folder: Path) -> dict[str, Any]:
    """The values of an earlier run's `settings.json`.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SETTINGS}, so there is no run to resume; leave out `--resume`."
        )
    return {name: entry["value"] for name, entry in json.loads(path.read_text("utf-8")).items()}


def saved_defaults(folder: Path) -> set[str]:
    """Names of the values that nobody had given to an earlier run."""
    data = json.loads((folder / SETTINGS).read_text("utf-8"))
    return {name for name, entry in data.items() if entry["source"] == DEFAULT}


def resolve(
    flags: Sequence[str],
    *,
    config: Path | None = None,
    base: Mapping[str, Any] | None = None,
    base_defaults: Collection[str] = (),
) -> Settings:
    """Put defaults, an earlier run, a YAML file and flags together, later ones winning.

    Args:
        flags: Command-line flags, `--name value` or `--name=value`; those of the allocation as
            `--allocation.name`, or by their bare name where TRL has no such field.
        config: A TRL SFT YAML with an optional block `allocation:`.
        base: Values of an earlier run, as `saved` gives them.
        base_defaults: Those among them that nobody had given.

    Raises:
        ValueError: An option is unknown or a value cannot be used.
    """
    parser = _parser()
    types = {action.dest: action for action in parser._actions}
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    layers = [(DEFAULT, dict(DEFAULTS))]
    if base:
        layers.append(("earlier run", {k: v for k, v in base.items() if k not in base_defaults}))
        layers.append((DEFAULT, {k: v for k, v in base.items() if k in base_defaults}))
    if config:
        layers.append((f"file {config}", _read_yaml(config, types)))
    layers.append(("flag", _read_flags(flags, parser)))
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers:
        given.update(values)
        sources.update(dict.fromkeys(values, source))
    if base is not None and given.get("protocol") != base.get("protocol"):
        raise ValueError(
            f"`protocol` is {given.get('protocol')!r}, but the run was begun with "
            f"{base.get('protocol')!r}; resume it without another, or begin again with "
            "`--overwrite`."
        )
    if given["output_dir"] is None:
        given["output_dir"] = _default_output_dir(given)
    if given.get("padding_free") and not given.get("packing") and "max_length" not in given:
        # TRL does not cut examples that it joins, and says so instead of ignoring the limit.
        given["max_length"], sources["max_length"] = None, "as padding_free"
    follows = given["eval_strategy"] != "no" and sources["save_strategy"] == DEFAULT
    if given.get("load_best_model_at_end") and follows:
        # Trainer wants a checkpoint at every evaluation then.
        given["save_strategy"] = given["eval_strategy"]
        if given["eval_strategy"] == "steps" and "save_steps" not in given:
            # Trainer's own default of `eval_steps` is `logging_steps`.
            given["save_steps"] = given.get("eval_steps") or given["logging_steps"]
            sources["save_steps"] = FOLLOWING
    return _build(parser, given, sources)


def known_fields() -> dict[str, list[tuple[str, Any]]]:
    """Every flag of `train` with its default, by the class it belongs to."""
    groups = {}
    for group in (*GROUPS, AllocationConfig):
        prefix = f"{BLOCK}." if group is AllocationConfig else ""
        groups[group.__name__] = [
            (prefix + f.name, None if f.default is dataclasses.MISSING else f.default)
            for f in fields(group)
            if f.init
        ]
    return groups


def _parser() -> HfArgumentParser:
    return HfArgumentParser(GROUPS, allow_abbrev=False, exit_on_error=False, add_help=False)


def _build(parser: HfArgumentParser, given: dict[str, Any], sources: dict[str, str]) -> Settings:
    dotted = (BLOCK + ".", OPTIONS + ".")
    flat = {name: value for name, value in given.items() if not name.startswith(dotted)}
    allocation = {
        name.removeprefix(BLOCK + "."): value
        for name, value in given.items()
        if name.startswith(BLOCK + ".")
    }
    try:
        script, training, model, mixture, run = parser.parse_dict(flat)
    except TypeError as error:
        raise ValueError(f"The settings do not fit together: {error}.") from error
    return Settings(
        script=script,
        training=training,
        model=model,
        mixture=mixture,
        run=run,
        allocation=AllocationConfig(**allocation),
        given=given,
        sources=sources,
    )


def _read_yaml(path: Path, types: Mapping[str, argparse.Action]) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; `--config` takes a YAML file.") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {where}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold `option: value` lines, not a {type(data).__name__}.")
    block = data.pop(BLOCK, None) or {}
    if not isinstance(block, dict):
        raise ValueError(f"The block `{BLOCK}:` in {path} must hold `option: value` lines.")
    for name, value in (data.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    values = {}
    for name, value in data.items():
        if name.startswith(OPTIONS + "."):
            values[name] = _scalar(value)
            continue
        if name not in types:
            raise ValueError(_unknown(name, types, f"in {path}"))
        # YAML reads 1e-4 as text; argparse's own type makes it a number.
        convert = types[name].type
        try:
            values[name] = convert(value) if callable(convert) and isinstance(value, str) else value
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"`{name}` in {path} cannot be {value!r}: {error}.") from error
    allocation = {f.name for f in fields(AllocationConfig)}
    for name, value in block.items():
        if name not in allocation:
            raise ValueError(_unknown(name, allocation, f"in the block `{BLOCK}:` of {path}"))
        values[f"{BLOCK}.{name}"] = _scalar(value)
    return values


def _read_flags(flags: Sequence[str], parser: HfArgumentParser) -> dict[str, Any]:
    own = {action.dest for action in parser._actions}
    allocation = {f.name for f in fields(AllocationConfig)}
    values: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(flags)
    while queue:
        flag = queue.pop(0)
        name, _, attached = flag.removeprefix("--").partition("=")
        if flag.startswith(f"--{OPTIONS}."):
            values[name.replace("-", "_")] = _scalar(_value_of(flag, attached, queue))
            continue
        bare = name.removeprefix(BLOCK + ".").replace("-", "_")
        dotted = name.startswith(BLOCK + ".")
        if not flag.startswith("--") or not (dotted or (bare in allocation and bare not in own)):
            rest.append(flag)
            continue
        if bare not in allocation:
            raise ValueError(
                _unknown(name, {f"{BLOCK}.{n}" for n in allocation}, "among the flags")
            )
        values[f"{BLOCK}.{bare}"] = _scalar(_value_of(flag, attached, queue))
    try:
        namespace, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(f"A flag could not be read: {error}.") from error
    if unknown:
        names = own | {f"{BLOCK}.{name}" for name in allocation}
        raise ValueError(_unknown(unknown[0].lstrip("-").split("=")[0], names, "among the flags"))
    return {**vars(namespace), **values}


def _value_of(flag: str, attached: str, queue: list[str]) -> str:
    """What was given with a flag, `--flag=value` or `--flag value`."""
    if not attached and (not queue or queue[0].startswith("--")):
        raise ValueError(f"The flag {flag} needs a value.")
    return attached or queue.pop(0)


def _scalar(value: Any) -> Any:
    """A YAML scalar, with 1e-4 read as a number too."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() else yaml.safe_load(value)
    except ValueError:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _unknown(name: str, known: Any, where: str) -> str:
    near = get_close_matches(name.replace("-", "_"), sorted(known), n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "`loralloc train --help-all` lists all."
    )
    return f"Unknown option {name!r} {where}; {hint}"


def _default_output_dir(given: Mapping[str, Any]) -> str:
    data = given.get("task") or Path(str(given.get("dataset_name") or "data")).stem
    return f"runs/{data}-{Path(given['model_name_or_path']).name}"
