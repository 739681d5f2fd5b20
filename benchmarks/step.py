"""A training step against the floor and against what users run today.

The floor is the frozen model alone: forward, and backward to its input, with logits at supervised
positions only. Every contestant takes forward, loss and backward on the same batch; the optimiser,
the same for all, is left out.

    floor*  the same with the attention that ours uses
    ours    the fused LoRA step, logits at supervised positions, attention for short sequences
    peft    PEFT's layers, logits at supervised positions
    trl     PEFT's layers under TRL's SFTTrainer, with its chunked loss
    hf      PEFT's layers under Trainer's default loss: all logits

Run: python benchmarks/step.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from torch.nn import functional
from trl import SFTTrainer

from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import IGNORED, supervised_logits
from loralloc.kernels.attention import use_short_attention
from loralloc.kernels.lora import fuse, unfuse


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    repeats, batch_size = (3, 8) if args.quick else (12, 16)
    results: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        results[dtype] = {
            task: measure(task, data, dtype=dtype, repeats=repeats, batch_size=batch_size)
            for task, data in harness.data_sets(args.data).items()
        }
    for dtype, tasks in results.items():
        for task, result in tasks.items():
            medians = {name: statistics.median(s) for name, s in result["seconds"].items()}
            harness.show(
                f"step of smollm2-135m, {task}, {dtype}, batch {result['shape']}, "
                f"{result['supervised']} supervised tokens",
                ("", "seconds", "over the floor", "over ours"),
                [
                    (name, s, s / medians["floor"], s / medians["ours"])
                    for name, s in medians.items()
                ],
            )
        tasks.update(ratios(tasks))
    harness.write(args.json, {"quick": args.quick, **results})


def ratios(tasks: dict[str, Any]) -> dict[str, float]:
    """The worst of each ratio over the tasks."""

    def over(a: str, b: str) -> list[float]:
        return [harness.ratio(t["seconds"][a], t["seconds"][b]) for t in tasks.values()]

    return {
        "ours_over_floor": max(over("ours", "floor")),
        "ours_over_floor_same_attention": max(over("ours", "floor*")),
        "peft_over_ours": min(over("peft", "ours")),
        "trl_over_ours": min(over("trl", "ours")),
        "hf_over_ours": min(over("hf", "ours")),
    }


def measure(task: str, data: str, *, dtype: str, repeats: int, batch_size: int) -> dict[str, Any]:
    """Seconds of every contestant on one real batch."""
    flags = ("--dtype", dtype, "--per_device_train_batch_size", str(batch_size))
    run = harness.prepare(task, data, *flags)
    run.model.train()
    batch = dict(next(iter(run.trainer.get_train_dataloader())))
    steps = contestants(run, batch)
    return {
        "shape": list(batch["input_ids"].shape),
        "supervised": int((batch["labels"][:, 1:] != IGNORED).sum()),
        "seconds": harness.by_turns(steps, repeats=repeats),
    }


def contestants(run: Any, batch: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Every way to take the step, on one and the same model."""
    model, trainer = run.model, run.trainer
    weights = [p for p in model.parameters() if p.requires_grad]
    inner: Any = base_model(model)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for weight in weights:
            weight.grad = None

    def floor() -> None:
        with model.disable_adapter():
            inputs = {k: v for k, v in batch.items() if k != "input_ids"}
            embedded = inner.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            logits, targets = supervised_logits(model, {**inputs, "inputs_embeds": embedded})
            functional.cross_entropy(logits.float(), targets).backward()

    def stock(step: Callable[[], None]) -> Callable[[], None]:
        """The step with PEFT's layers and PyTorch's attention."""

        def changed_back() -> None:
            unfuse(model)
            inner.set_attn_implementation("sdpa")
            try:
                step()
            finally:
                fuse(model)
                use_short_attention(inner)

        return changed_back

    def supervised() -> torch.Tensor:
        logits, targets = supervised_logits(model, batch)
        return functional.cross_entropy(logits.float(), targets)

    return {
        "floor": stock(floor),
        "floor*": floor,
        "ours": lambda: backward(trainer.compute_loss(model, dict(batch))),
        "peft": stock(lambda: backward(supervised())),
        "trl": stock(lambda: backward(SFTTrainer.compute_loss(trainer, model, dict(batch)))),
        "hf": stock(lambda: backward(model(**batch).loss)),
    }


if __name__ == "__main__":
    main()
