"""What a run is trained on, in hashes: a resumed run has to find the same rows and backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

SAMPLES = 64
"""Numbers of a weight that its hash is of; other weights differ in more than these few."""

NAMES = {
    "train": "the training examples",
    "validation": "the examples to evaluate on",
    "backbone": "the backbone's weights",
}
"""What is hashed, for messages."""


def hashes(trainer: Trainer) -> dict[str, str]:
    """Hashes of a trainer's examples as the model reads them, and of its frozen weights.

    Examples are hashed after they were tokenised, so that another tokenizer or template shows too.
    """
    found = {"backbone": _of_weights(trainer.model)}
    for name, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        if isinstance(dataset, Dataset):
            found[name] = _of_rows(dataset)
    return found


def check_same(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with other examples or another backbone.

    Args:
        folder: The run's, for the message.
        before: What `hashes` gave when the run began.
        now: What it gives now.

    Raises:
        ValueError: Naming what differs.
    """
    changed = [name for name in NAMES if name in before and before[name] != now.get(name)]
    if changed:
        what = " and ".join(NAMES[name] for name in changed)
        raise ValueError(
            f"The run in {folder} began with other data than there is now: {what} differ; give it "
            "what it began with, or go on all the same with `--force`."
        )


def _of_rows(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            digest.update(name.encode())
            _add(digest, batch.column(name).combine_chunks())
    return digest.hexdigest()


def _add(digest: Any, values: Any) -> None:
    """Add an Arrow array by its values: of lists their lengths, then what is in them."""
    array = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(array.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        array = array.flatten()
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), default=str).encode())


def _of_weights(model: nn.Module) -> str:
    weights = dict(model.named_parameters())
    frozen = {name: p for name, p in weights.items() if not p.requires_grad} or weights
    digest = hashlib.sha256()
    for name, weight in sorted(frozen.items()):
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
