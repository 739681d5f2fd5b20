"""`loralloc demo`: a real model fine-tuned in minutes, with what it learnt and where ranks went."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.cli.console import Console

if TYPE_CHECKING:
    from rich.table import Table

    from loralloc.allocation.record import Record
    from loralloc.evaluation.metrics import Figure
    from loralloc.runs.run import Run
    from loralloc.tasks.task import Example

OPTIONS: dict[str, Any] = {
    "task": "demo",
    "dataset_name": "demo",
    "model_name_or_path": "smollm2-135m",
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "rounds_at": [0.125, 0.5, 0.875],
    "ranks_per_round": 30,
    "eval_strategy": "no",
    "save_strategy": "no",
}
"""The demo's run, but for its length. Rounds that come early and far apart, and a learning rate
that does not fall, leave new ranks time to learn before the next round scores them."""

MOST_STEPS, FEWEST_STEPS = 96, 48
FITS_S = 300.0
"""What the whole demo may take; on a slow machine it takes fewer steps."""

REST = 80
"""What all else takes, in training steps of the same time: loading, scoring three times, and
measuring the test set three times."""

SHOWN = 3
"""Generated sentences shown."""

MAX_NEW_TOKENS = 48


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "demo",
        help="begin here: fine-tune a real model in a few minutes",
        description=(
            "Fine-tune SmolLM2-135M to turn facts about a restaurant into a sentence, with three "
            "rounds of allocation, and by plain LoRA to compare with; needs neither a GPU nor a "
            "model hub."
        ),
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="runs/demo")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and compare with the model before and with plain LoRA."""
    from loralloc.cli.progress import Progress, prepare_process
    from loralloc.report.grid import RankGrid
    from loralloc.report.ranks import rank_table
    from loralloc.runs import folder as run_folder
    from loralloc.runs import run as runs

    prepare_process()
    out = Console()
    if run_folder.holds_run(args.output_dir) and not args.overwrite:
        raise ValueError(
            f"{args.output_dir} already holds a run; replace it with `--overwrite` or name another "
            "`--output_dir`."
        )
    progress = Progress(out)
    with out.status("loading SmolLM2-135M"):
        options = {**OPTIONS, "output_dir": args.output_dir, "max_steps": MOST_STEPS}
        prepare = partial(runs.prepare, overwrite=args.overwrite, on_round=progress.show_round)
        prepared = prepare(options)
        step_s = step_seconds(prepared)
        num_steps = fitting_steps(step_s)
        if num_steps < MOST_STEPS:
            prepared = prepare({**options, "max_steps": num_steps})
    progress.introduce(prepared)
    out.print(how_long(num_steps, step_s), highlight=False)
    progress.take_over(prepared.trainer)
    before = _measure(prepared, "before training")
    with progress.shown():
        runs.train(prepared)
    after = _measure(prepared, "after training")
    lora = _plain_lora(num_steps, out)
    out.print(_comparison(before, lora, after))
    signature = after.bleu.implementation
    out.print(signature, style="dim", markup=False, highlight=False, soft_wrap=True)
    out.print(
        "LoRA is the same run without rounds. One seed of few steps: a small difference between "
        "the two says nothing.",
        highlight=False,
    )
    out.print(_sentences(before, after))
    assert prepared.allocation is not None, "the demo's method allocates"
    record = prepared.allocation.record
    out.print(rank_table(RankGrid.from_allocation(record.as_data(), scored=True), out.width))
    out.print(_kept(record), highlight=False)
    figures = {"before": before, "lora": lora, "after": after}
    result = {name: measured.figures() for name, measured in figures.items()}
    (args.output_dir / run_folder.DEMO).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    out.print(f"\nadapter: {args.output_dir}/ (opens with stock PEFT)")
    return 0


def _plain_lora(num_steps: int, out: Console) -> Measured:
    """The same run without rounds, which leaves no folder."""
    from loralloc.allocation.config import AllocationConfig
    from loralloc.cli.progress import Progress
    from loralloc.runs import run as runs

    of_rounds = {field.name for field in fields(AllocationConfig)}
    options = {name: value for name, value in OPTIONS.items() if name not in of_rounds}
    progress = Progress(out)
    with tempfile.TemporaryDirectory() as folder:
        with out.status("loading SmolLM2-135M again, for plain LoRA"):
            where = Path(folder) / "lora"
            prepared = runs.prepare(
                {**options, "method": "lora", "output_dir": where, "max_steps": num_steps}
            )
        progress.introduce(prepared)
        progress.take_over(prepared.trainer)
        with progress.shown():
            runs.train(prepared)
        return _measure(prepared, "after LoRA")


def step_seconds(prepared: Run) -> float:
    """Seconds of a training step on this machine, from two that leave no trace.

    They are forward and backward passes without an optimiser; a third warms up before them.
    """
    import torch

    from loralloc.allocation.supervised import SupervisedLoss

    model, loss = prepared.model, SupervisedLoss(prepared.model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    was_training = model.training
    model.train()
    seconds = []
    with torch.random.fork_rng():
        for batch in islice(prepared.trainer.get_train_dataloader(), 3):
            begin = time.perf_counter()
            torch.autograd.grad(loss(batch).losses.mean(), trained)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - begin)
    model.train(was_training)
    return sum(seconds[1:]) / 2


def fitting_steps(step_s: float) -> int:
    """Training steps with which the whole demo takes about five minutes, where it can."""
    return min(max(int(FITS_S / step_s - REST) // 2, FEWEST_STEPS), MOST_STEPS)


def how_long(num_steps: int, step_s: float) -> str:
    """How long the whole demo takes, in a sentence."""
    minutes = max(round((2 * num_steps + REST) * step_s / 60), 1)
    time = f"about {minutes} minutes" if minutes > 1 else "about a minute"
    return (
        f"{time} if this machine stays as busy as it is: {num_steps} training steps of "
        f"{step_s:.2g} s with {len(OPTIONS['rounds_at'])} rounds, as many of plain LoRA, and "
        "three tests"
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The model on the test set, at one time."""

    loss: float
    bleu: Figure
    examples: Sequence[Example]
    generated: Sequence[str]

    def figures(self) -> dict[str, object]:
        """The figures as data."""
        return {"test_loss": self.loss, "test_bleu": asdict(self.bleu)}


def _measure(prepared: Run, when: str) -> Measured:
    from loralloc.evaluation.generation import generate
    from loralloc.evaluation.metrics import bleu
    from loralloc.tasks.columns import merge_references, to_examples, to_sft

    assert prepared.task is not None
    with Console().status(f"measuring on the test set {when}"):
        split = prepared.splits["test"]
        examples = merge_references(to_examples(split, prepared.task))
        data = to_sft({"test": split}, prepared.task)["test"].dataset
        loss = prepared.trainer.evaluate(data, metric_key_prefix="test")["test_loss"]
        generated = generate(
            prepared.model,
            prepared.tokenizer,
            [example.prompt for example in examples],
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=50,
        )
        figure = bleu(generated, [example.references for example in examples])
    return Measured(loss=loss, bleu=figure, examples=examples, generated=generated)


def _comparison(before: Measured, lora: Measured, after: Measured) -> Table:
    from rich.table import Table

    table = Table(title=f"test set, {len(after.generated)} examples", title_justify="left")
    for name in ("", "before", "LoRA", "ALoRA"):
        table.add_column(name, justify="right")
    times = (before, lora, after)
    table.add_row("loss", *(f"{measured.loss:.3f}" for measured in times))
    table.add_row("BLEU", *(f"{measured.bleu.value:.1f}" for measured in times))
    return table


def _kept(record: Record) -> str:
    """How many of the ranks that were given proved themselves."""
    last = len(record.rounds)
    given = sum(sum(entry.added.values()) for entry in record.rounds[:-1])
    kept = sum(0 < birth < last for births in record.births().values() for birth in births)
    return (
        f"{kept} of the {given} ranks given before round {last} have outlasted every scoring since."
    )


def _sentences(before: Measured, after: Measured) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for example, old, new in list(
        zip(after.examples, before.generated, after.generated, strict=True)
    )[:SHOWN]:
        for name, text in (("facts", example.prompt), ("before", old), ("after", new)):
            table.add_row(name, " ".join(text.split()))
        table.add_section()
        table.add_row("", "")
    return table
