"""The settings of a run, resolved, with where each came from: default, file, flag, earlier run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.files import read_json, write_text
from loralloc.allocation.named import name_of
from loralloc.runs.arguments import BLOCK, DEFAULTS, OPTIONS, RunArguments
from loralloc.runs.checks import check_packages
from loralloc.runs.folder import SETTINGS
from loralloc.runs.permissions import SECRETS, check_granted_again, without_permissions
from loralloc.runs.ranges import check_numbers
from loralloc.runs.sources import parser, read_flags, read_mapping, read_yaml

Options = Sequence[str] | Mapping[str, Any]
"""Flags of the command line, or a mapping in Python; see `sources`."""

DEFAULT = "loralloc default"
"""Source of a value that nobody gave."""
GIVEN = ("flag", "file", "Python")
"""What the source of a value begins with that somebody gave now."""

FOLLOWING = "as eval_steps"
"""Source of `save_steps` where checkpoints have to follow the evaluations."""


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
        return _without(OPTIONS, self.given)

    def gives(self, name: str) -> bool:
        """Whether this value comes from elsewhere than the defaults."""
        return self.sources.get(name, DEFAULT) not in (DEFAULT, FOLLOWING)

    def with_defaults(self, values: Mapping[str, Any], *, source: str) -> Settings:
        """These settings with other defaults; a value that was given stays."""
        new = {name: value for name, value in values.items() if not self.gives(name)}
        return self.replaced(new, source=source)

    def replaced(self, values: Mapping[str, Any], *, source: str) -> Settings:
        """These settings with other values, whoever gave those that were there."""
        sources = {**self.sources, **dict.fromkeys(values, source)}
        return _build({**self.given, **values}, sources)

    def save(self) -> None:
        """Write `settings.json` into the run folder."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        data = {
            name: {"value": value, "source": self.sources[name]}
            for name, value in self.given.items()
            if name not in SECRETS
        }
        text = json.dumps(data, indent=1, default=_written)
        write_text(self.output_dir / SETTINGS, text + "\n")


def _written(value: Any) -> str:
    """A value that JSON has no form for: a function or class goes by where it is."""
    return name_of(value) if callable(value) else str(value)


def saved(folder: Path) -> dict[str, Any]:
    """The values of an earlier run's `settings.json`, but for what a folder may not grant.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    return without_permissions(saved_values(folder))


def saved_values(folder: Path) -> dict[str, Any]:
    """All values of an earlier run's `settings.json`; whoever acts on them trusts the folder.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SETTINGS}, so there is no run to resume; leave out `--resume`."
        )
    return {name: entry["value"] for name, entry in _entries(path).items()}


def saved_defaults(folder: Path) -> set[str]:
    """Names of the values that nobody had given to an earlier run."""
    entries = _entries(folder / SETTINGS)
    return {name for name, entry in entries.items() if entry.get("source") == DEFAULT}


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    data = read_json(path)
    for name, entry in data.items():
        if not isinstance(entry, dict) or "value" not in entry:
            raise ValueError(
                f"{path} has no value of {name!r:.60}; take the file from the run again."
            )
    return data


def resolve(
    options: Options = (),
    *,
    config: Path | str | None = None,
    base: Mapping[str, Any] | None = None,
    base_defaults: Collection[str] = (),
) -> Settings:
    """Put defaults, an earlier run, a YAML file and options together, later ones winning.

    Args:
        options: Flags, or a mapping in Python, in which `config` may name the file.
        config: A TRL SFT YAML, with the blocks of `sources.read_yaml`.
        base: Values of an earlier run, as `saved` gives them.
        base_defaults: Those among them that nobody had given.

    Raises:
        ValueError: An option is unknown or a value cannot be used.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [(DEFAULT, DEFAULTS)]
    if base:
        layers.append(("earlier run", {k: v for k, v in base.items() if k not in base_defaults}))
        layers.append((DEFAULT, {k: v for k, v in base.items() if k in base_defaults}))
    if isinstance(options, Mapping):
        config = options.get("config", config)
        options = {name: value for name, value in options.items() if name != "config"}
    if config:
        layers.append((f"file {config}", read_yaml(Path(config))))
    if isinstance(options, Mapping):
        layers.append(("Python", read_mapping(options)))
    else:
        layers.append(("flag", read_flags(options)))
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
    _fill_in(given, sources)
    return _build(given, sources)


def resolve_again(options: Options, *, config: Path | None = None) -> Settings:
    """The settings of the run in the folder that is asked for, with what is given now over them.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: An option is unknown or a value cannot be used.
    """
    now = resolve(options, config=config)
    folder = now.output_dir
    given = {name: value for name, value in now.given.items() if now.gives(name)}
    check_granted_again(folder, saved_values(folder), given)
    return resolve(options, config=config, base=saved(folder), base_defaults=saved_defaults(folder))


def with_same_steps(settings: Settings, *, before: int) -> Settings:
    """Batches of which a step has as many examples as with the processes that there were before.

    Batches that were given now stay as they are.

    Args:
        settings: Of a run that is gone on with.
        before: Its processes until now.

    Raises:
        ValueError: The processes that there are cannot share a step of it.
    """
    args, names = settings.training, ("per_device_train_batch_size", "gradient_accumulation_steps")
    now, (size, accumulated) = args.world_size, (getattr(args, name) for name in names)
    if now == before or any(settings.sources.get(name, "").startswith(GIVEN) for name in names):
        return settings
    examples = size * accumulated * before
    share, rest = divmod(examples, now)
    if rest:
        raise ValueError(
            f"A step of the run has {examples} examples, of {before} processes, which {now} cannot "
            "share equally; start a number that divides it, or give another "
            "`--per_device_train_batch_size`."
        )
    size = next(n for n in range(min(size, share), 0, -1) if share % n == 0)
    why = f"as before: {examples} examples a step"
    return settings.replaced(dict(zip(names, (size, share // size), strict=True)), source=why)


def _fill_in(given: dict[str, Any], sources: dict[str, str]) -> None:
    """Values that follow from others."""
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


def _default_output_dir(given: Mapping[str, Any]) -> str:
    data = given.get("task") or Path(str(given.get("dataset_name") or "data")).stem
    return f"runs/{data}-{Path(given['model_name_or_path']).name}"


def _build(given: dict[str, Any], sources: dict[str, str]) -> Settings:
    dotted = (BLOCK + ".", OPTIONS + ".")
    flat = {name: value for name, value in given.items() if not name.startswith(dotted)}
    check_numbers(flat)
    check_packages(flat)
    try:
        script, training, model, mixture, run = parser().parse_dict(flat)
    except TypeError as error:
        raise ValueError(f"The settings do not fit together: {error}.") from error
    return Settings(
        script=script,
        training=training,
        model=model,
        mixture=mixture,
        run=run,
        allocation=AllocationConfig(**_without(BLOCK, given)),
        given=given,
        sources=sources,
    )


def _without(block: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a block, by their bare names."""
    start = block + "."
    return {
        name.removeprefix(start): value for name, value in given.items() if name.startswith(start)
    }
