"""Opening an adapter folder twice: what was written is kept only where it computes the same."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralloc.adapters.folder import read_adapter
from loralloc.allocation.files import flush_file, flush_folder
from loralloc.methods.opening import open_adapter
from loralloc.runs.folder import LABELS, PEFT_CONFIG, adapter_config, saved_labels
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.models import load_tokenizer, locate
from loralloc.runs.trained import backbone_name, head_of, load_backbone

TOLERANCE = 2e-5
"""Most that logits may differ in float32, as a share of the largest one, or of 1."""

TEXTS = (
    "The restaurant near the river serves good food at a low price.",
    "What is the capital of the country where most of these people live?",
    "In 1969 two men walked on the moon while a third one waited above.",
    "def mean(values):\n    return sum(values) / len(values)",
)
"""What logits are compared on, where there is a tokenizer."""


class Source:
    """An adapter folder and the backbone it belongs to."""

    def __init__(self, folder: Path, base: str | None, trust_remote_code: bool) -> None:
        if not (folder / PEFT_CONFIG).is_file():
            raise ValueError(
                f"{folder} holds no {PEFT_CONFIG}, so no adapter of PEFT's, which is what can be "
                "exported and resized; name a folder that has one."
            )
        self.folder, self.base, self.trust_remote_code = folder, base, trust_remote_code
        config = adapter_config(folder)
        self.head: Head = LM if config.get("task_type") is None else head_of(folder)
        self.labels = _labels(folder) if self.head.has_labels else ()

    @property
    def backbone(self) -> str:
        """The name or place of the backbone."""
        return backbone_name(self.folder, self.base)

    def load(self) -> Any:
        """The backbone in float32, anew."""
        model = load_backbone(
            self.folder,
            head=self.head,
            labels=self.labels,
            trust_remote_code=self.trust_remote_code,
            base=self.base,
            dtype=torch.float32,
        )
        # An adapter of a quantised backbone was trained on the weights that it computes with.
        return model.dequantize() if getattr(model, "is_quantized", False) else model

    def tokenizer(self) -> Any | None:
        """The run's tokenizer or the backbone's; None where neither has one."""
        for place in (str(self.folder), self.backbone):
            path = Path(locate(place))
            if not path.is_dir() or (path / "tokenizer_config.json").is_file():
                return load_tokenizer(place, trust_remote_code=self.trust_remote_code)
        return None

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer into a folder, where there is one."""
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def named_beside(folder: Path, ending: str) -> Path:
    """The folder beside another that is named after it, as its user named that one."""
    folder = Path(os.path.normpath(folder))
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}-{ending}")


@contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name once all went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f".{output.name}.{os.getpid()}.partial")
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                path.chmod(scratch.stat().st_mode & 0o666)  # safetensors' are the owner's alone
                flush_file(path)
        if output.exists():
            raise ValueError(f"{output} was made meanwhile; name another `--output_dir`.")
        scratch.rename(output)
        flush_folder(output.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open_on(model: Any, folder: Path) -> Any:
    """The adapter in a folder on a backbone, by PEFT."""
    with warnings.catch_warnings():
        # PEFT sets it by itself where a backbone has Conv1D.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set", UserWarning)
        return open_adapter(model, folder)


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits of every row by itself: a classifier without a padding token takes no more."""
    found = []
    for row in rows:
        outputs = model(input_ids=row[None])
        parts = (
            [outputs.logits]
            if hasattr(outputs, "logits")
            else [outputs.start_logits, outputs.end_logits]
        )
        found.append(torch.cat([part.float().flatten() for part in parts]))
    return found


def rows_for(source: Source, model: Any) -> list[Tensor]:
    """Token ids to compare on: of texts, or drawn where there is no tokenizer."""
    size = int(model.get_input_embeddings().weight.shape[0])
    tokenizer = source.tokenizer()
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(size, (len(TEXTS), 16), generator=generator))
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [row[row < size] for row in rows]


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest between two logits in the same place."""
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())


HEADS = ("score", "classifier", "out_proj")
"""Names of the layer that puts out a classifier's logits."""


def _labels(folder: Path) -> list[str]:
    """The names of a classifier's labels; where a folder has none, as many as its head has rows."""
    if (folder / LABELS).is_file():
        return saved_labels(folder)
    heads = [
        tensor
        for name, tensor in read_adapter(folder).others.items()
        if name.endswith(".weight") and name.split(".")[-2] in HEADS
    ]
    if not heads:
        raise ValueError(
            f"{folder} holds no classifier's head and no {LABELS}, so it is not known how many "
            "labels there are."
        )
    return [f"LABEL_{index}" for index in range(heads[-1].shape[0])]
