"""One whole run of one contestant in a process of its own, for `end_to_end.py` and `memory.py`.

Prints one line of JSON: seconds of training, by the clock and of the processor (which say the same
of an idle machine only), seconds of every round, peak resident memory.

    lora       `loralloc train --method lora`
    alora      `loralloc train`
    adalora    PEFT's AdaLoRA, init_r twice the target, in the same trainer, its schedule driven by
               a callback; alpha such that its scale is LoRA's

Run: python benchmarks/whole_run.py CONTESTANT TASK DATA MODEL [FLAG ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import harness
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from loralloc.methods.targets import resolve_targets
from loralloc.training import run as runs
from loralloc.training.settings import resolve

CONTESTANTS = ("lora", "alora", "adalora")
ROUNDS = ("--num_rounds", "--warmup_epochs", "--recovery_epochs")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("model")
    args, flags = parser.parse_known_args(argv)
    harness.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        run = runs.prepare(
            resolve(
                [
                    *("--task", args.task, "--dataset_name", args.data, "--output_dir", folder),
                    *("--model_name_or_path", args.model, "--save_strategy", "no"),
                    *("--eval_strategy", "no", "--disable_tqdm", "true"),
                    *(flags if args.contestant == "alora" else _without_rounds(flags)),
                    *("--method", "alora" if args.contestant == "alora" else "lora"),
                ]
            )
        )
        trainer = run.trainer
        if args.contestant == "adalora":
            trainer = adalora(run)
        begin = _cpu_seconds()
        _, seconds = harness.timed(trainer.train)
        cpu_seconds = _cpu_seconds() - begin
        record = run.allocation.record.rounds if run.allocation else []
        rounds = [entry.seconds for entry in record]
        result = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "round_seconds": rounds,
            "steps": trainer.state.global_step,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    sys.stdout.write(json.dumps(result) + "\n")


def _without_rounds(flags: Sequence[str]) -> list[str]:
    """The flags but those of the allocation, which nothing else has."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in ROUNDS for part in pair]


def _cpu_seconds() -> float:
    """Seconds that all threads of this process have computed so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def adalora(run: runs.Run) -> Any:
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

    stock = SFTTrainer if run.head == "lm" else Trainer
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
