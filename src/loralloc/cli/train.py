"""`loralloc train`: a whole run from settings to a run folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText
from loralloc.runs import launched

FLAGS = """\
the flags used most (defaults in brackets):
  --task NAME                   a known data set: its prompts, labels and metric (`loralloc tasks`)
  --dataset_name DATA           a folder, a file (.json .jsonl .csv .parquet), a Hub name or `demo`
  --model_name_or_path MODEL    smollm2-135m, minilm-l6, a folder or a Hub name [smollm2-135m]
  --output_dir FOLDER           the run folder [runs/DATA-MODEL]
  --method NAME                 how the model is adapted (`loralloc methods`) [alora]
  --budget N                    parameters it may add, instead of those of LoRA with rank 8
  --lora_r R                    rank of every module at the start [8]
  --num_train_epochs N          [3]
  --learning_rate LR            [2e-4]
  --per_device_train_batch_size N  [16]
  --num_rounds N                rounds of allocation [8]
  --warmup_epochs E             epochs before the first round [1]
  --recovery_epochs E           epochs between rounds [0.25]
  --ranks_per_round N           a number, `block` or `model` [block]
  --score NAME                  gradient, screened, ablation, shapley; architecture (ALoRA-DNAS) or
                                sensitivity (ALoRA-Sensi) [gradient]
  --allocation.budget UNIT      what stays the same: ranks or parameters [ranks]
  --target_parameters N         with `--method shrink`: the size to end with, instead of the
                                smallest whose held-out loss is not worse
  --protocol paper|tuned        batch, length, evaluation and early stopping as in the paper; tuned:
                                with the learning rate that the method recommends

Every field of TRL's SFTConfig, ModelConfig and ScriptArguments and of AllocationConfig is a flag,
and so are a method's options, as --method.NAME; `loralloc train --help-all` lists all. A TRL SFT
YAML is taken as it is, with one more block:

  allocation:
    num_rounds: 8
    ranks_per_round: block
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "train",
        help="fine-tune a model, by ALoRA or another method",
        description="Fine-tune a model: by default with LoRA whose ranks move between modules.",
        epilog=FLAGS,
        formatter_class=HelpText,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings; flags win over them")
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="check all, show the plan, train nothing",
    )
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    held.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument(
        "--force", action="store_true", help="resume although data or backbone have changed"
    )
    parser.add_argument("--help-all", action="store_true", help="list every flag and its default")
    parser.set_defaults(run=run, takes_more_flags=True, takes_processes=True)


def run(args: argparse.Namespace) -> int:
    """Train, or show what would be trained."""
    out = Console(quiet=not launched.is_main())
    with out.status("loading PyTorch, Transformers and TRL"):
        from loralloc.cli.progress import Progress, prepare_process

        launched.find_each_other()
        prepare_process()
    if args.help_all:
        _print_all_flags()
        return 0
    from loralloc.runs import run as runs
    from loralloc.runs.folder import REPLACED
    from loralloc.runs.settings import resolve, resolve_again
    from loralloc.runs.stopping import StopOnSignal, Stopped

    ask = resolve_again if args.resume else resolve
    settings = ask(args.rest, config=args.config)
    if args.dry_run:
        from loralloc.cli.dry_run import show

        # Nothing is overwritten before training begins.
        show(runs.prepare(settings, resume=args.resume, overwrite=not args.resume), out)
        return 0
    progress = Progress(out)
    model = settings.model.model_name_or_path
    source = settings.script.dataset_name or settings.run.task or "the mixture"
    with out.status(Text(f"loading {model}, and {source} to train on")):
        prepared = runs.prepare(
            settings,
            resume=args.resume,
            overwrite=args.overwrite,
            force=args.force,
            on_round=progress.show_round,
        )
    progress.introduce(prepared)
    progress.take_over(prepared.trainer)
    folder = settings.output_dir
    stopping = StopOnSignal()
    prepared.trainer.add_callback(stopping)
    try:
        with progress.shown(), stopping:
            runs.train(prepared)
    except Stopped as stopped:
        launched.part()
        out.print(f"\nStopped at step {stopped.step}, as asked. {_go_on(folder)}")
        return 0
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and launched.is_main():
            sys.stderr.write(f"\n{_go_on(folder)}")
        if launched.is_main() and (folder / REPLACED).is_dir():
            sys.stderr.write(f"\nThe run that was in {folder} before lies in {folder / REPLACED}.")
        raise
    launched.part()
    progress.conclude(prepared)
    out.print(f"\nadapter: {folder}")
    if prepared.allocation:
        from loralloc.allocation.shrinking import in_words

        if found := in_words(prepared.allocation.record):
            out.print(found, highlight=False)
        out.print(f"its ranks: loralloc ranks {folder}")
    if prepared.head.generates:
        out.print(f"try it: loralloc generate {folder} --prompt ...")
    elif prepared.head.name == "classification":
        out.print(f"label rows: loralloc predict {folder} new.csv")
    return 0


def _go_on(folder: Path) -> str:
    """How to go on with a run that did not come to its end."""
    from loralloc.training.seal import newest_whole

    checkpoint = newest_whole(folder)
    if checkpoint is None:
        return f"There is no checkpoint in {folder} yet; the run begins anew with --overwrite."
    command = f"loralloc train --resume --output_dir {shlex.quote(str(folder))}"
    return f"Go on from {checkpoint.name} with: {command}"


def _print_all_flags() -> None:
    from rich.padding import Padding
    from rich.text import Text

    from loralloc.runs.flags import flags, unread

    out = Console()
    for group, members in flags().items():
        out.print(f"\n{group}", style="bold")
        for flag in members:
            default = "" if flag.default is None else f"  [{_shown(flag.default)}]"
            out.print(Text(f"  --{flag.name}{default}"), highlight=False, soft_wrap=True)
            if flag.help:
                out.print(Padding(Text(flag.help, style="dim"), (0, 0, 0, 8)))
    out.print("\nNo run reads", style="bold")
    for name, why in unread().items():
        out.print(Padding(Text(f"{name}: {why}"), (0, 0, 0, 2)))


def _shown(default: Any) -> str:
    """A default as it would be given."""
    if isinstance(default, bool):
        return str(default).lower()
    return str(getattr(default, "value", default))
