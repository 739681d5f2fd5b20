"""The rows of a run: loaded, numbered, and with a development set."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, get_dataset

from loralloc.runs.settings import Settings
from loralloc.tasks.catalog import load_task
from loralloc.tasks.source import Split, load_splits
from loralloc.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

ROW = "source_row"
"""Column that remembers each example's row in its source while the data is prepared."""

HOLD_OUT_SEED = 0
"""Seed of rows held out from training data: the split's own, not the run's."""

SPLIT_FIELDS = {"train": "dataset_train_split", "validation": "dataset_test_split"}
"""Settings that name a split of the source."""


def load(settings: Settings, task: Task | None) -> dict[str, Split]:
    """Load the splits that the settings name: a mixture, a data set, or the task's own.

    Raises:
        ValueError: No data is named, or it cannot be loaded; one sentence.
    """
    if settings.mixture.datasets:
        return with_text(_mixture(settings), settings)
    script = settings.script
    chosen = {name: getattr(script, field) for name, field in SPLIT_FIELDS.items()}
    given = {name: own for name, own in chosen.items() if settings.gives(SPLIT_FIELDS[name])}
    names = {"train": script.dataset_train_split, **given} if given else None
    config = script.dataset_config
    if task:
        return load_task(task, script.dataset_name, config=config, split_names=names)
    if script.dataset_name is None:
        raise ValueError(
            "No data is named; give `--dataset_name` a folder, a file, a Hub name or `demo`."
        )
    splits = load_splits(script.dataset_name, config=config, split_names=names)
    return with_text(splits, settings)


def _mixture(settings: Settings) -> dict[str, Split]:
    """TRL's mixture of data sets; its test split, if it has one, is what a run validates on."""
    whole, size = _load_mixture(settings.mixture), settings.mixture.test_split_size
    offers = {"train": whole}
    if size is not None:
        count = int(size) if size >= 1 else size  # a share of the rows, or so many
        # As TRL divides it, but by a seed: a resumed run has to find the same rows held out.
        offers = dict(whole.train_test_split(test_size=count, seed=HOLD_OUT_SEED))
    splits = {}
    for name, field in SPLIT_FIELDS.items():
        own = getattr(settings.script, field)
        if own in offers:
            source = f"the mixture's split {own}"
            splits[name] = Split(name=name, dataset=offers[own], source=source)
        elif settings.gives(field):
            raise ValueError(
                f"`{field}` is {own!r}, but a mixture has the split 'train' and, with "
                "`test_split_size`, 'test'; leave it out."
            )
    return splits


def _load_mixture(mixture: DatasetMixtureConfig) -> Dataset:
    """All rows of a mixture.

    Raises:
        ValueError: They cannot be loaded or do not have the same columns.
    """
    try:
        return get_dataset(dataclasses.replace(mixture, test_split_size=None))["train"]
    except Exception as error:  # the builders' and the Hub client's classes have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"The mixture in `datasets` cannot be loaded: {reason}.") from error


def with_text(splits: dict[str, Split], settings: Settings) -> dict[str, Split]:
    """TRL's `dataset_text_field` under the one name that is read from here on."""
    field = settings.training.dataset_text_field
    return {
        name: dataclasses.replace(split, dataset=split.dataset.rename_column(field, "text"))
        if field in split.dataset.column_names and "text" not in split.dataset.column_names
        else split
        for name, split in splits.items()
    }


def used(splits: dict[str, Split]) -> dict[str, Split]:
    """The splits that training reads: a test split's labels may be hidden."""
    if "train" not in splits:
        raise ValueError(
            f"There is no train split, only {', '.join(splits)}; name one with "
            "`--dataset_train_split`."
        )
    return {name: splits[name] for name in ("train", "validation") if name in splits}


def numbered(splits: dict[str, Split]) -> dict[str, Split]:
    """Each example with the number of its row, for what is to be said about it later."""
    return {
        name: dataclasses.replace(
            split, dataset=split.dataset.add_column(ROW, list(range(1, len(split.dataset) + 1)))
        )
        for name, split in splits.items()
    }


def with_validation(splits: dict[str, Split], settings: Settings) -> dict[str, Split]:
    """Hold a development set out of the training data where the data has none."""
    if "validation" in splits:
        return splits
    train, size = splits["train"], settings.run.validation_examples
    if size < 1:
        raise ValueError(
            f"`validation_examples` is {size}, but ranks are measured on held-out examples; give "
            "at least 1, or add a validation file."
        )
    if size >= len(train.dataset):
        raise ValueError(
            f"{train.source} has {len(train.dataset)} rows and no validation split, and "
            f"`validation_examples` would hold out {size}; lower it or add a validation file."
        )
    parts = train.dataset.train_test_split(test_size=size, seed=HOLD_OUT_SEED)
    return {
        **splits,
        "train": dataclasses.replace(train, dataset=parts["train"]),
        "validation": Split(
            name="validation",
            dataset=parts["test"],
            source=f"{size} rows held out of {train.source}",
        ),
    }
