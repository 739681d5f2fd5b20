"""Writing a run's adapter, or anybody's, in the form that a server reads, and checking it there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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
from loralloc.allocation.files import read_json
from loralloc.runs.models import load_model
from loralloc.runs.verifying import (
    TOLERANCE,
    Source,
    largest_difference,
    logits_of,
    named_beside,
    open_on,
    rows_for,
    written_beside,
)

FORMATS = ("peft", "portable", "merged", "gguf", "mlx")
"""What an adapter can be written as."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the weights that are written."""

MODEL_CONFIG = "config.json"
"""Transformers' description of a model."""

GGUF_NAME = "adapter.gguf"
"""The file of `gguf`."""

ROUNDED = 0.1
"""Most that 16 bits in an adapter may change, as a share of what the adapter itself changes."""

ROUNDED_MODEL = 0.05
"""Most that 16 bits in a whole model may change, as a share of the largest logit."""


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
        output = named_beside(folder, to)
    if output.exists():
        raise ValueError(f"{output} is there already; name another `--output_dir`, or remove it.")
    source = Source(folder, base, trust_remote_code)
    adapter = None if to == "merged" else read_adapter(folder)
    model = source.load()
    if adapter is not None:
        check_shapes(adapter, linear_shapes(model))
        adapter.check_plain()
    rows = rows_for(source, model)
    base_rows, run_rows, adapted = _of_the_run(model, folder, rows)
    merged = adapted.merge_and_unload() if to == "merged" else None
    del adapted, model
    with written_beside(output) as scratch:
        if merged is not None:
            merged.to(DTYPES[dtype]).save_pretrained(scratch)
            repeat_rotary(scratch)
            source.save_tokenizer(scratch)
            del merged
            opened = load_model(
                str(scratch),
                head=source.head,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
        else:
            assert adapter is not None
            opened = _write(scratch, adapter, to, DTYPES[dtype], rank_multiple, source.load())
        found = logits_of(opened.eval(), rows)
        del opened
        allowed = _allowed(to, dtype, run_rows, base_rows)
        difference = largest_difference(found, run_rows)
        if not difference <= allowed:
            raise ValueError(
                f"The logits of the export differ from the run's by {difference:.2g}, and "
                f"{allowed:.2g} is allowed, so it was not kept; try `--dtype float32`, and where "
                "that does not help, report it."
            )
    return Exported(path=output, difference=difference, allowed=allowed)


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """(out_features, in_features) of every linear layer, by its full name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[name] = (int(module.out_features), int(module.in_features))
    return found


def write_form(folder: Path, form: Form) -> None:
    """Write an adapter of PEFT's into a folder that is there."""
    text = json.dumps(form.config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    save_file(form.tensors, folder / WEIGHTS, metadata={"format": "pt"})


def repeat_rotary(folder: Path) -> None:
    """Say a model's rotary embedding under the names of Transformers 4 as well.

    Transformers 5 writes `rope_parameters`; readers that know `rope_theta` and `rope_scaling` only,
    MLX-LM among them, take their default where these are missing, and another model it is.
    """
    config = read_json(folder / MODEL_CONFIG)
    rotary = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rotary or "rope_theta" in config:
        return
    config["rope_theta"] = rotary.pop("rope_theta")
    if "partial_rotary_factor" in rotary:
        config.setdefault("partial_rotary_factor", rotary.pop("partial_rotary_factor"))
    if rotary.get("rope_type", "default") != "default":
        config["rope_scaling"] = rotary
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")


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
        return open_on(model, scratch)
    form = portable(adapter, shapes, rank_multiple=rank_multiple, dtype=dtype)
    if to == "portable":
        write_form(scratch, form)
        return open_on(model, scratch)
    from loralloc.adapters.mlx_folder import read_mlx, write_mlx

    write_mlx(scratch, form, num_layers=int(model.config.num_hidden_layers))
    return _with_deltas(model, read_mlx(scratch))


def _with_deltas(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, delta in deltas.items():
            module: Any = model.get_submodule(name)
            module.weight += delta.T if isinstance(module, Conv1D) else delta
    return model


def _of_the_run(
    model: Any, folder: Path, rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], PeftModel]:
    adapted = open_on(model, folder).eval()
    with adapted.disable_adapter():
        without = logits_of(adapted, rows)
    return without, logits_of(adapted, rows), adapted


def _allowed(to: str, dtype: str, run: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    largest = max(1.0, max(float(row.abs().max()) for row in run))
    allowed = TOLERANCE * largest
    if dtype != "float32":
        allowed += (
            ROUNDED_MODEL * largest if to == "merged" else ROUNDED * largest_difference(run, base)
        )
    return allowed


def _check_choices(to: str, dtype: str, rank_multiple: int) -> None:
    for option, value, known in (("to", to, FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"`--{option}` is {value!r}; use one of {', '.join(known)}.")
    if rank_multiple != 1 and to not in ("portable", "mlx"):
        raise ValueError(
            f"`--rank-multiple` is for the one rank of portable and mlx, and {to} has none; leave "
            "it out."
        )
