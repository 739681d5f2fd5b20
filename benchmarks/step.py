"""A training step against the floor and against what users run today, one optimisation at a time.

Every contestant takes forward, loss and backward on one real batch; the optimiser, the same for
all, is left out. The floor is the frozen model alone as Transformers has it: forward, and backward
to its input, with logits at supervised positions only. Each rung of the ladder keeps what the ones
above it brought:

    hf          PEFT's layers under Trainer's default loss: logits of every position
    peft        logits at supervised positions
    head        the frozen head and its cross-entropy as one function, a few rows at a time
    lora        each LoRA linear as one function, in the activation's dtype
    shared      linears that read the same input share their product with A
    product     float32 products by oneDNN where MKL is slow (the same as `shared` in bfloat16)
    ours        attention over short sequences (the same as `product` in float32)

`trl` is PEFT under TRL's SFTTrainer, with its chunked loss; `floor*` the floor with the
attention of ours, for what the LoRA path alone adds in bfloat16.

Run: python benchmarks/step.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import harness
import torch
from contestants import Step, backward_of, floor, stock, supervised_loss
from trl import SFTTrainer

from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import IGNORED, SupervisedLoss
from loralloc.kernels import products
from loralloc.kernels.attention import use_short_attention
from loralloc.kernels.lora import is_fused
from loralloc.kernels.packed import Packs
from loralloc.training.batches import BucketSampler

LADDER = ("hf", "peft", "head", "lora", "shared", "product", "ours")


PACKS: weakref.WeakKeyDictionary[Any, Packs] = weakref.WeakKeyDictionary()
"""Of the rung on which layers share nothing, by model."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    repeats, batch_size = (2, 8) if args.quick else (10, 16)
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
        "ours_over_floor_with_our_attention": max(over("ours", "floor*")),
        "peft_over_ours": min(over("peft", "ours")),
        "trl_over_ours": min(over("trl", "ours")),
        "hf_over_ours": min(over("hf", "ours")),
    }


def measure(task: str, data: str, *, dtype: str, repeats: int, batch_size: int) -> dict[str, Any]:
    """Seconds of every contestant on one real batch of middling length."""
    run = harness.prepare(task, data, dtype=dtype, per_device_train_batch_size=batch_size)
    run.model.train()
    rows = run.trainer.train_dataset
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    order = list(BucketSampler(lengths, batch_size=batch_size, seed=0))
    middle = sorted(order[i : i + batch_size] for i in range(0, len(order), batch_size))
    middle.sort(key=lambda batch: max(lengths[i] for i in batch))
    batch = run.trainer.data_collator([rows[i] for i in middle[len(middle) // 2]])
    batch = harness.on_device(batch)
    return {
        "shape": list(batch["input_ids"].shape),
        "supervised": int((batch["labels"][:, 1:] != IGNORED).sum()),
        "padded_tokens_random_over_buckets": padding(lengths, batch_size),
        "seconds": harness.by_turns(ladder(run, dict(batch)), repeats=repeats),
    }


def padding(lengths: list[int], batch_size: int) -> float:
    """Tokens of an epoch with padding, batches drawn at random over batches of like length."""

    def tokens(order: list[int]) -> int:
        batches = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    return tokens(random) / tokens(list(BucketSampler(lengths, batch_size=batch_size, seed=0)))


def ladder(run: Any, batch: dict[str, Any]) -> dict[str, Step]:
    """Every way to take the step, on one and the same model."""
    model, trainer = run.model, run.trainer
    inner: Any = base_model(model)
    loss_at_head = SupervisedLoss(model)
    backward = backward_of(model)

    def head() -> torch.Tensor:
        found = loss_at_head(batch)
        return found.total / found.num_targets

    def rung(name: str, loss: Callable[[], torch.Tensor]) -> Step:
        def step() -> None:
            with only_up_to(name, inner):
                backward(loss())

        return step

    def stock_floor() -> None:
        with only_up_to("hf", inner):
            floor(model, batch)

    return {
        "floor": stock_floor,
        "floor*": lambda: floor(model, batch),
        "trl": rung("hf", lambda: SFTTrainer.compute_loss(trainer, model, dict(batch))),
        "hf": rung("hf", lambda: model(**batch).loss),
        "peft": rung("peft", lambda: supervised_loss(model, batch)),
        **{name: rung(name, head) for name in LADDER[2:-1]},
        "ours": lambda: backward(trainer.compute_loss(model, dict(batch))),
    }


@contextmanager
def only_up_to(rung: str, inner: Any) -> Iterator[None]:
    """The model with the kernels of the ladder up to a rung."""
    height = LADDER.index(rung)
    is_slow = products.mkl_is_slow
    layers: list[Any] = [layer for layer in inner.modules() if is_fused(layer)]
    were = [(layer.shared_input, layer.packs) for layer in layers]
    alone = PACKS.setdefault(inner, Packs())  # kept from pass to pass, as that of the others is
    if LADDER.index("lora") <= height < LADDER.index("shared"):
        for layer in layers:
            layer.shared_input, layer.packs = None, alone
    if height < LADDER.index("product"):
        products.mkl_is_slow = lambda: False
    inner.set_attn_implementation("sdpa")
    try:
        with stock(inner) if height < LADDER.index("lora") else nullcontext():
            yield
    finally:
        products.mkl_is_slow = is_slow
        for layer, (shared, packs) in zip(layers, were, strict=True):
            layer.shared_input, layer.packs = shared, packs
        use_short_attention(inner)


if __name__ == "__main__":
    main()
