"""`loralloc demo`: a real model fine-tuned in minutes, with what it learnt and where ranks went."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from loralloc.evaluation.metrics import Figure
    from loralloc.runs.run import Run
    from loralloc.tasks.task import Example

OPTIONS: dict[str, Any] = {
    "task": "demo",
    "dataset_name": "demo",
    "model_name_or_path": "smollm2-135m",
    "per_device_train_batch_size": 8,
    "max_steps": 96,
    "learning_rate": 2e-3,
    "num_rounds": 3,
    "ranks_per_round": 30,
    "warmup_epochs": 0.25,
    "recovery_epochs": 0.15,
    "eval_strategy": "no",
    "save_strategy": "no",
}
"""The demo's run: 768 examples, rounds after steps 31, 50 and 69."""

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
            "rounds of allocation; needs neither a GPU nor a model hub."
        ),
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="runs/demo")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and compare before with after."""
    from loralloc.cli.progress import Progress, prepare_process
    from loralloc.report.grid import RankGrid
    from loralloc.report.ranks import rank_table
    from loralloc.runs import folder as run_folder
    from loralloc.runs import run as runs

    prepare_process()
    out = console()
    if run_folder.holds_run(args.output_dir) and not args.overwrite:
        raise ValueError(
            f"{args.output_dir} already holds a run; replace it with `--overwrite` or name another "
            "`--output_dir`."
        )
    progress = Progress(out)
    with out.status("loading SmolLM2-135M"):
        prepared = runs.prepare(
            {**OPTIONS, "output_dir": args.output_dir},
            overwrite=args.overwrite,
            on_round=progress.show_round,
        )
    progress.introduce(prepared)
    progress.take_over(prepared.trainer)
    before = _measure(prepared, "before training")
    with progress.shown():
        runs.train(prepared)
    after = _measure(prepared, "after training")
    out.print(_comparison(before, after))
    out.print(_sentences(before, after))
    assert prepared.allocation is not None, "the demo's method allocates"
    record = prepared.allocation.record
    out.print(rank_table(RankGrid.from_allocation(record.as_data()), out.width))
    result = {"before": before.figures(), "after": after.figures()}
    (args.output_dir / run_folder.DEMO).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    out.print(f"\nadapter: [bold]{args.output_dir}/[/] (opens with stock PEFT)")
    return 0


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
    with console().status(f"measuring on the test set {when}"):
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


def _comparison(before: Measured, after: Measured) -> Table:
    from rich.table import Table

    table = Table(title=f"test set, {len(after.generated)} examples", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right")
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("BLEU", f"{before.bleu.value:.1f}", f"{after.bleu.value:.1f}")
    table.caption = after.bleu.implementation
    return table


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
