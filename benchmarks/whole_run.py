"""One whole run of one contestant in a process of its own, for `end_to_end.py` and `memory.py`.

Contestants take turns: each trains ten steps for every line that it is sent, and answers with a
line, so that a machine that slows down slows all of them. The last line is JSON: the seconds of
every turn (waiting does not count), seconds of every round, peak resident memory.

    lora       `loralloc train --method lora`
    alora      `loralloc train`
    adalora    PEFT's AdaLoRA, init_r twice the target, in the same trainer, its schedule driven by
               a callback; alpha such that its scale is LoRA's

Run: python benchmarks/whole_run.py CONTESTANT TASK DATA MODEL OPTIONS
OPTIONS are those of `loralloc train` as a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from peft import AdaLoraConfig, get_peft_model
from processes import WAITING
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTTrainer

import loralloc
from loralloc.methods.peft_method import resolve_targets

CONTESTANTS = ("lora", "alora", "adalora")
ROUNDS = ("num_rounds", "warmup_epochs", "recovery_epochs")
"""Options of the allocation, which nothing else has."""
STEPS = 10
"""Steps of a turn."""


class Turns(TrainerCallback):
    """Waits for a line before every turn, and keeps the seconds of each."""

    def __init__(self) -> None:
        """Nothing has begun."""
        self.seconds: list[float] = []

    def begin(self) -> None:
        """Wait for a line; where there is no one to send any, go on at once."""
        sys.stdout.write(WAITING + "\n")
        sys.stdout.flush()
        sys.stdin.readline()
        self._begun = time.perf_counter()

    def end(self) -> None:
        """The turn is over."""
        self.seconds.append(time.perf_counter() - self._begun)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step of a turn."""
        if state.global_step % STEPS == 0:
            self.end()
            self.begin()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("options", type=json.loads)
    args = parser.parse_args(argv)
    harness.prepare_process()
    options, method = args.options, args.contestant
    if method != "alora":
        method = "lora"
        options = {name: value for name, value in options.items() if name not in ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        run = loralloc.prepare(
            {
                "task": args.task,
                "dataset_name": args.data,
                "model_name_or_path": args.model,
                "output_dir": folder,
                "save_strategy": "no",
                "eval_strategy": "no",
                "disable_tqdm": True,
                "method": method,
                **options,
            }
        )
        trainer = run.trainer
        if args.contestant == "adalora":
            trainer = adalora(run)
        turns = Turns()
        trainer.add_callback(turns)
        trainer.remove_callback(PrinterCallback)  # standard output is for the answers
        turns.begin()
        trainer.train()
        turns.end()
        record = run.allocation.record.rounds if run.allocation else []
        rounds = [entry.seconds for entry in record]
        result = {
            "seconds": sum(turns.seconds),
            "turn_seconds": turns.seconds,
            "round_seconds": rounds,
            "steps": trainer.state.global_step,
            "peak_bytes": _peak_bytes(),
        }
    sys.stdout.write(json.dumps(result) + "\n")


def _peak_bytes() -> int:
    """Peak resident memory of this process, as Linux tells it.

    `getrusage` would begin with what the process that started this one held. Where there is a GPU,
    what counts is its memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def adalora(run: loralloc.Run) -> Any:
    """The same run with PEFT's AdaLoRA in the place of LoRA, under the libraries' own trainers."""
    lora = run.model.peft_config["default"]
    base = run.model.unload()
    steps = len(run.trainer.get_train_dataloader()) * run.trainer.args.num_train_epochs
    steps = int(steps) if run.trainer.args.max_steps < 0 else run.trainer.args.max_steps
    init_r = 2 * lora.r
    config = AdaLoraConfig(
        init_r=init_r,
        target_r=lora.r,
        lora_alpha=init_r * lora.lora_alpha // lora.r,  # PEFT scales by alpha / init_r
        target_modules=resolve_targets(base, None),
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=10,
        task_type=lora.task_type,
        modules_to_save=lora.modules_to_save,
    )
    model = get_peft_model(base, config)

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    stock = SFTTrainer if isinstance(run.trainer, SFTTrainer) else Trainer
    return stock(
        model=model,
        args=run.trainer.args,
        train_dataset=run.trainer.train_dataset,
        eval_dataset=run.trainer.eval_dataset,
        data_collator=run.trainer.data_collator,
        processing_class=run.tokenizer,
        callbacks=[Allocate()],
    )


if __name__ == "__main__":
    main()
