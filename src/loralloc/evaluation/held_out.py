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

from loralloc.allocation.files import read_json, refuse_links, write_text
from loralloc.allocation.supervised import SupervisedLoss, supervised_positions
from loralloc.evaluation.predictions import EVAL_NAME
from loralloc.evaluation.prompts import evaluating
from loralloc.runs import data as run_data
from loralloc.runs.folder import EVALUATIONS, SETTINGS, saved_labels
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.settings import Settings, resolve
from loralloc.runs.trained import head_of, load_trained, saved_settings
from loralloc.tasks.classification import to_classification
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
    path = folder / EVAL_NAME
    refuse_links([folder, path])
    if path.exists() and "settings" in read_json(path):
        raise ValueError(
            f"{folder} holds the evaluation of a task, which this one would replace; name another "
            "`--output_dir`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**dataclasses.asdict(found), "perplexity": found.perplexity, "base": base}
    write_text(path, json.dumps(facts, indent=1) + "\n")
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
    if own_name is None and data is None:
        splits = run_data.load(settings, None)
    else:
        splits = _splits(run, settings, data, own_name)
    if data is None and not own_name and "validation" not in splits and "train" in splits:
        return _held_out_of_train(run, head, settings, splits, split)
    name = _named(splits, "test" if own_name else split)
    return _in_columns(run, head, settings, {name: splits[name]})[name], own_name or name


def _splits(
    run: Path, settings: Settings, data: str | None, own_name: str | None
) -> dict[str, Split]:
    """Other data than what the run was trained on, or a split of it that it did not read."""
    place = data or settings.script.dataset_name
    if place is None:
        raise ValueError(f"The run in {run} has no data of its own; name it with `--data`.")
    config = settings.script.dataset_config if data is None else None
    names = {"test": own_name} if own_name else None
    return run_data.with_text(load_splits(place, config=config, split_names=names), settings)


def _held_out_of_train(
    run: Path, head: Head, settings: Settings, splits: dict[str, Split], split: str | None
) -> tuple[Split, str]:
    """As `_rows`, of data whose validation rows the run has held out of those it trained on."""
    name = _named({**splits, "validation": splits["train"]}, split)
    if name != "validation":
        return _in_columns(run, head, settings, {name: splits[name]})[name], name
    train = _in_columns(run, head, settings, {"train": splits["train"]})
    return run_data.with_validation(run_data.numbered(train), settings)[name], name


def _named(splits: Mapping[str, Split], split: str | None) -> str:
    """Which split is to be measured.

    Raises:
        ValueError: It is not there.
    """
    name = split or next((n for n in ("test", "validation") if n in splits), "train")
    if name not in splits:
        raise ValueError(f"The data has no {name} split, only {', '.join(splits)}; name one.")
    return name


def _in_columns(
    run: Path, head: Head, settings: Settings, splits: dict[str, Split]
) -> dict[str, Split]:
    """Rows in the columns of the head's trainer; labels have the numbers that the run gave them."""
    if not head.has_labels:
        return head.rows(splits, None, settings.run)[0]
    options = settings.run
    return to_classification(
        splits,
        text_column=options.text_column,
        text_pair_column=options.text_pair_column,
        label_column=options.label_column,
        labels=saved_labels(run),
    )[0]


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
