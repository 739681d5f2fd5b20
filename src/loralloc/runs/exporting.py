"""Writing a run's adapter, or anybody's, in the form that a server reads, and checking it there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralloc.adapters.folder import CONFIG, WEIGHTS, Adapter, read_adapter
from loralloc.adapters.forms import Form, Shape, check_shapes, compact, portable
from loralloc.allocation.files import flush_file, flush_folder
from loralloc.methods.opening import open_adapter
from loralloc.runs.folder import LABELS, PEFT_CONFIG, adapter_config, saved_labels
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.models import load_model, load_tokenizer, locate
from loralloc.runs.trained import head_of, load_backbone

FORMATS = ("peft", "portable", "merged", "gguf", "mlx")
"""What an adapter can be written as."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the weights that are written."""

GGUF_NAME = "adapter.gguf"
"""The file of `gguf`."""

TOLERANCE = 2e-5
"""Most that logits may differ in float32, as a share of the largest one, or of 1."""

ROUNDED = 0.1
"""Most that 16 bits in an adapter may change, as a share of what the adapter itself changes."""

ROUNDED_MODEL = 0.05
"""Most that 16 bits in a whole model may change, as a share of the largest logit."""

TEXTS = (
    "The restaurant near the river serves good food at a low price.",
    "What is the capital of the country where most of these people live?",
    "In 1969 two men walked on the moon while a third one waited above.",
    "def mean(values):\n    return sum(values) / len(values)",
)
"""What logits are compared on, where there is a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export came to."""

    path: Path
    """The folder."""

    difference: float
    """The largest difference between a logit of the run and one of what was written."""

    allowed: float
    """The largest that would have been accepted."""


def export(
    folder: Path,
    *,
    to: str,
    output: Path | None = None,
    dtype: str = "float32",
    rank_multiple: int = 1,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an adapter in another form; nothing is left where its logits are not the run's.

    Args:
        folder: A run folder, or any folder with an adapter of PEFT's.
        to: One of `FORMATS`.
        output: Where to, a folder that is not there yet; by default "FOLDER-FORMAT" beside it.
        dtype: Of the weights that are written; one of `DTYPES`.
        rank_multiple: The one rank of `portable` and `mlx` is a multiple of this.
        base: Another name or place of the backbone than the folder says.
        trust_remote_code: Whether code that comes with the backbone may run.

    Raises:
        ValueError: The form cannot hold the adapter, or the folder to write is there.
    """
    _check_choices(to, dtype, rank_multiple)
    folder = Path(os.path.normpath(folder))
    if output is None:
        output = folder.absolute().with_name(f"{folder.absolute().name}-{to}")
    if output.exists():
        raise ValueError(f"{output} is there already; name another `--output_dir`, or remove it.")
    source = _Source(folder, base, trust_remote_code)
    adapter = None if to == "merged" else read_adapter(folder)
    model = source.load()
    if adapter is not None:
        check_shapes(adapter, linear_shapes(model))
        adapter.check_plain()
    rows = _rows(source, model)
    base_rows, run_rows, adapted = _of_the_run(model, folder, rows)
    merged = adapted.merge_and_unload() if to == "merged" else None
    del adapted, model
    with written_beside(output) as scratch:
        if merged is not None:
            merged.to(DTYPES[dtype]).save_pretrained(scratch)
            source.save_tokenizer(scratch)
            del merged
            opened = load_model(str(scratch), head=source.head, dtype=torch.float32)
        else:
            assert adapter is not None
            opened = _write(scratch, adapter, to, DTYPES[dtype], rank_multiple, source.load())
        found = _logits(opened.eval(), rows)
        del opened
        allowed = _allowed(to, dtype, run_rows, base_rows)
        difference = _largest(found, run_rows)
        if not difference <= allowed:
            raise ValueError(
                f"The logits of the export differ from the run's by {difference:.2g}, and "
                f"{allowed:.2g} is allowed, so it was not kept; try `--dtype float32`, and where "
                "that does not help, report it."
            )
    return Exported(path=output, difference=difference, allowed=allowed)


class _Source:
    """An adapter folder and the backbone it belongs to."""

    def __init__(self, folder: Path, base: str | None, trust_remote_code: bool) -> None:
        if not (folder / PEFT_CONFIG).is_file():
            raise ValueError(
                f"{folder} holds no {PEFT_CONFIG}, so no adapter of PEFT's, which is what can be "
                "exported; name a folder that has one."
            )
        self.folder, self.base, self.trust_remote_code = folder, base, trust_remote_code
        config = adapter_config(folder)
        self.head: Head = LM if config.get("task_type") is None else head_of(folder)
        self.labels = _labels(folder) if self.head.has_labels else ()

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
        places = [str(self.folder), *([self.base] if self.base else [])]
        name = adapter_config(self.folder).get("base_model_name_or_path")
        for place in [*places, *([name] if name else [])]:
            path = Path(locate(place))
            if not path.is_dir() or (path / "tokenizer_config.json").is_file():
                return load_tokenizer(place, trust_remote_code=self.trust_remote_code)
        return None

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """(out_features, in_features) of every linear layer, by its full name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[name] = (int(module.out_features), int(module.in_features))
    return found


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


def write_form(folder: Path, form: Form) -> None:
    """Write an adapter of PEFT's into a folder that is there."""
    text = json.dumps(form.config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    save_file(form.tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write(
    scratch: Path,
    adapter: Adapter,
    to: str,
    dtype: torch.dtype,
    rank_multiple: int,
    model: Any,
) -> Any:
    """Write an adapter, and give a backbone what the written files alone say."""
    shapes = linear_shapes(model)
    if to == "gguf":
        from loralloc.adapters.gguf_file import layout_of, read_gguf, write_gguf

        layout = layout_of(model.config, shapes)
        write_gguf(scratch / GGUF_NAME, adapter, layout, dtype)
        return _with_deltas(model, read_gguf(scratch / GGUF_NAME, layout))
    if to == "peft":
        write_form(scratch, compact(adapter, dtype))
        return _open(model, scratch)
    form = portable(adapter, shapes, rank_multiple=rank_multiple, dtype=dtype)
    if to == "portable":
        write_form(scratch, form)
        return _open(model, scratch)
    from loralloc.adapters.mlx_folder import read_mlx, write_mlx

    write_mlx(scratch, form, num_layers=int(model.config.num_hidden_layers))
    return _with_deltas(model, read_mlx(scratch))


def _open(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT sets it by itself where a backbone has Conv1D.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set", UserWarning)
        return open_adapter(model, folder)


def _with_deltas(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, delta in deltas.items():
            module: Any = model.get_submodule(name)
            module.weight += delta.T if isinstance(module, Conv1D) else delta
    return model


def _of_the_run(
    model: Any, folder: Path, rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], PeftModel]:
    adapted = _open(model, folder).eval()
    with adapted.disable_adapter():
        without = _logits(adapted, rows)
    return without, _logits(adapted, rows), adapted


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of every row by itself: a classifier without a padding token takes no more."""
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


def _rows(source: _Source, model: Any) -> list[Tensor]:
    """Token ids to compare on: of texts, or drawn where there is no tokenizer."""
    size = int(model.get_input_embeddings().weight.shape[0])
    tokenizer = source.tokenizer()
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(size, (len(TEXTS), 16), generator=generator))
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [row[row < size] for row in rows]


def _allowed(to: str, dtype: str, run: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    largest = max(1.0, max(float(row.abs().max()) for row in run))
    allowed = TOLERANCE * largest
    if dtype != "float32":
        allowed += ROUNDED_MODEL * largest if to == "merged" else ROUNDED * _largest(run, base)
    return allowed


def _largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())


def _labels(folder: Path) -> list[str]:
    """The names of a classifier's labels; where a folder has none, as many as its head has rows."""
    if (folder / LABELS).is_file():
        return saved_labels(folder)
    heads = [
        tensor
        for name, tensor in read_adapter(folder).others.items()
        if name.endswith(("score.weight", "classifier.weight", "out_proj.weight"))
    ]
    if not heads:
        raise ValueError(
            f"{folder} holds no classifier's head and no {LABELS}, so it is not known how many "
            "labels there are."
        )
    return [f"LABEL_{index}" for index in range(heads[-1].shape[0])]


def _check_choices(to: str, dtype: str, rank_multiple: int) -> None:
    for option, value, known in (("to", to, FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"`--{option}` is {value!r}; use one of {', '.join(known)}.")
    if rank_multiple != 1 and to not in ("portable", "mlx"):
        raise ValueError(
            f"`--rank-multiple` is for the one rank of portable and mlx, and {to} has none; leave "
            "it out."
        )
