"""What a run without a task is measured by: the loss on rows that it did not train on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from loralloc.allocation.files import refuse_links, write_text
from loralloc.allocation.supervised import SupervisedLoss, supervised_positions
from loralloc.evaluation.prompts import evaluating
from loralloc.runs import data as run_data
from loralloc.runs.folder import EVALUATIONS, SETTINGS, saved_labels
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.settings import Settings, resolve
from loralloc.runs.trained import head_of, load_trained, saved_settings
from loralloc.tasks.source import SPELLINGS, Split, load_splits


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A run's figures on held-out rows."""

    split: str
    """train, validation or test, or the split's own name."""

    source: str
    """Where the rows came from."""

    num_examples: int
    """How many were measured."""

    num_in_split: int
    """How many the split has."""

    num_targets: int
    """Supervised tokens, or labels: what the figures are means over."""

    loss: float
    """Mean cross-entropy, in nats."""

    accuracy: float
    """Share of targets that have the highest logit."""

    counts_tokens: bool
    """Whether targets are tokens, whose loss has a perplexity."""

    @property
    def perplexity(self) -> float | None:
        """exp(loss) of a language model; None of a classifier."""
        return math.exp(self.loss) if self.counts_tokens else None


def measure_held_out(
    run: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    base: bool = False,
    trust_remote_code: bool = False,
) -> HeldOut:
    """Measure a run on rows as it read them in training, by the loss that it was trained with.

    Args:
        run: A run folder, whose run had no task.
        data: A folder, a file or a Hub name; None for the run's data.
        split: train, validation or test, or a split's own name; None for the test split, or where
            there is none the validation split, which may be what the run held out of its data.
        batch_size: Examples at once.
        limit: Only so many examples, the first; None for all.
        base: Without the adapter.
        trust_remote_code: Whether code that comes with the backbone may run.

    Raises:
        ValueError: The folder holds no finished run, or the data cannot be read as the run's was;
            one sentence.
    """
    head, settings = head_of(run), _settings(run, batch_size)
    chosen, name = _rows(run, head, settings, data, split)
    whole = len(chosen.dataset)
    if limit is not None:
        kept = chosen.dataset.select(range(min(limit, whole)))
        chosen = dataclasses.replace(chosen, dataset=kept)
    model, tokenizer = load_trained(
        run, with_adapter=not base, head=head, trust_remote_code=trust_remote_code
    )
    splits = {"train": chosen, "validation": chosen}
    trainer = head.trainer(model, tokenizer, splits, settings)
    total, correct, count = 0.0, 0, 0
    measure = _tokens(model) if head is LM else _labels(model)
    with evaluating(model), torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            inputs = trainer._prepare_inputs(batch)
            losses, right = measure(inputs)
            total += float(losses.sum())
            correct += int(right)
            count += len(losses)
    found = HeldOut(
        split=name,
        source=chosen.source,
        num_examples=len(chosen.dataset),
        num_in_split=whole,
        num_targets=count,
        loss=total / count,
        accuracy=correct / count,
        counts_tokens=head is LM,
    )
    return found


def save(found: HeldOut, run: Path, *, base: bool, output_dir: Path | None = None) -> Path:
    """Write `eval.json` with the figures.

    Returns:
        Its folder: `output_dir`, or eval/held-out-SPLIT in the run folder.
    """
    where = f"held-out-{found.split.replace('/', '_')}" + ("-base" if base else "")
    folder = output_dir or run / EVALUATIONS / where
    refuse_links([folder, folder / "eval.json"])
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**dataclasses.asdict(found), "perplexity": found.perplexity, "base": base}
    write_text(folder / "eval.json", json.dumps(facts, indent=1) + "\n")
    return folder


def _settings(run: Path, batch_size: int) -> Settings:
    """The run's settings, for a trainer that trains nothing."""
    if not (run / SETTINGS).is_file():
        raise ValueError(
            f"{run} holds no {SETTINGS}, so how its rows were read is not known; name a task with "
            "`--task`."
        )
    now = {"per_device_eval_batch_size": batch_size, "output_dir": str(run), "report_to": "none"}
    return resolve(now, base=saved_settings(run))


def _rows(
    run: Path, head: Head, settings: Settings, data: str | None, split: str | None
) -> tuple[Split, str]:
    """The rows to measure, in the columns of the head's trainer, and the name of their split."""
    own_name = split if split is not None and split not in SPELLINGS else None
    if own_name:
        place = data or settings.script.dataset_name
        if place is None:
            raise ValueError(f"The run in {run} has no data of its own; name it with `--data`.")
        names = {"test": own_name}
        if head.has_labels:
            names["train"] = settings.script.dataset_train_split
        splits = load_splits(place, split_names=names)
        split = "test"
    elif data is not None:
        splits = load_splits(data)
        if split is None and set(splits) == {"train"}:
            split = "train"  # one file
    else:
        splits = run_data.load(settings, None)
    named, labels = head.rows(splits, None, settings.run)
    if data is None and not own_name and "validation" not in named:
        held = {name: rows for name, rows in named.items() if name == "train"}
        named |= run_data.with_validation(run_data.numbered(held), settings)
    name = split or next((n for n in ("test", "validation") if n in named), "train")
    if name not in named:
        raise ValueError(f"The data has no {name} split, only {', '.join(named)}; name one.")
    if head.has_labels:
        named[name] = _with_labels_of_run(named[name], labels, saved_labels(run))
    return named[name], own_name or name


def _with_labels_of_run(split: Split, names: tuple[str, ...], own: list[str]) -> Split:
    """Number the labels as the run did: other data may lack some."""
    if unknown := [name for name in names if name not in own]:
        raise ValueError(
            f"{split.source} has the label {unknown[0]!r}, and the run knows {', '.join(own)}."
        )
    numbers = [own.index(names[label]) for label in split.dataset["label"]]
    column = split.dataset.remove_columns("label").add_column("label", numbers)
    return dataclasses.replace(split, dataset=column)


def _tokens(model: Any) -> Any:
    loss = SupervisedLoss(model)

    def measure(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        found = loss(inputs, positions=supervised_positions(inputs["labels"]))
        return found.losses, found.correct

    return measure


def _labels(model: Any) -> Any:
    def measure(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = inputs["labels"]
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses, (logits.argmax(dim=-1) == labels).sum()

    return measure
