"""How a round grows with modules, ranks and rounds: time, memory and record.

Run: python experiments/scale.py

One process and one thread; a Llama of width 8 with as many blocks as it takes. Times are medians of
rounds in one process, noisy on a busy machine; sizes are not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from reliability_page import PAGE, SCALE, page
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc import AllocationConfig
from loralloc.allocation.allocator import Allocator
from loralloc.allocation.record import FILE_NAME, Record

MODULES_A_BLOCK = 7
WIDTH = 8

SAVED_EACH = 10
"""Of so many checkpoints one is written, and stands for them all."""


def main() -> None:
    """Measure, write what came out and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, nargs="+", default=[98, 994, 10_003])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=SCALE)
    args = parser.parse_args()
    data = {
        "command": "python experiments/scale.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "rounds": _many_rounds(args.rounds),
        "wide": _sized(14, r=256),
        "modules": [_sized(count) for count in args.modules],
    }
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page())
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def adapted(num_modules: int, *, r: int) -> Any:
    """A Llama with so many linear layers, all with r ranks."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=num_modules // MODULES_A_BLOCK,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    options = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(backbone, options)


class Rounds:
    """Training steps and rounds of one model."""

    def __init__(self, num_modules: int, *, r: int, num_rounds: int, **options: Any) -> None:
        """Build it all."""
        self.model = adapted(num_modules, r=r)
        ids = torch.arange(8 * 12).reshape(8, 12) * 7 % 32
        self.batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-2)
        config = AllocationConfig(num_rounds=num_rounds, seed=0, **options)
        self.train()
        self.allocator = Allocator(self.model, config, [self.batch])

    def train(self) -> None:
        """A step of the optimiser."""
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def round(self, number: int) -> float:
        """A round after a step of training; its seconds."""
        begin = time.perf_counter()
        self.allocator.step(self.optimizer, step=number, epoch=float(number))
        seconds = time.perf_counter() - begin
        self.train()
        return seconds


def _many_rounds(count: int) -> dict[str, Any]:
    rounds = Rounds(14, r=4, num_rounds=count, ranks_per_round=2)  # of more, some are lost
    seconds, memory = [], {}
    for number in range(1, count + 1):
        seconds.append(rounds.round(number))
        if number in (10, count):
            memory[str(number)] = resident_bytes()
    entries = rounds.allocator.record.rounds
    ranks = rounds.allocator.record.ranks
    early, late = seconds[10:110], seconds[-100:]
    return {
        "modules": 14,
        "ranks": sum(ranks.values()),
        "rounds": count,
        "emptied": sum(rank == 0 for rank in ranks.values()),
        "resident_bytes": memory,
        "growth": memory[str(count)] / memory["10"] - 1,
        "early_s": statistics.median(early),
        "late_s": statistics.median(late),
        "early_bytes": len(json.dumps(dataclasses.asdict(entries[9]))),
        "late_bytes": len(json.dumps(dataclasses.asdict(entries[-1]))),
        "saved": _saved(rounds.allocator.record),
    }


def _saved(record: Record) -> dict[str, Any]:
    """What the record costs where every round has a checkpoint, with the disk's own time."""
    seconds, sizes = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for count in range(SAVED_EACH, len(record.rounds) + 1, SAVED_EACH):
            sofar = dataclasses.replace(record, rounds=record.rounds[:count])
            begin = time.perf_counter()
            sofar.save(folder)
            seconds.append(time.perf_counter() - begin)
            sizes.append((Path(folder) / FILE_NAME).stat().st_size)
    return {
        "last_s": statistics.median(seconds[-5:]),
        "last_bytes": sizes[-1],
        "a_round_s": statistics.mean(seconds),
        "all_bytes": SAVED_EACH * sum(sizes),
        "a_rank_bytes": sizes[-1] / sum(sum(of.ranks_before.values()) for of in record.rounds),
    }


def _sized(num_modules: int, *, r: int = 8, num_rounds: int = 5) -> dict[str, Any]:
    begin = time.perf_counter()
    rounds = Rounds(num_modules, r=r, num_rounds=num_rounds)
    built, before = time.perf_counter() - begin, resident_bytes()
    seconds = [rounds.round(number) for number in range(1, num_rounds + 1)]
    record = rounds.allocator.record
    return {
        "modules": len(record.ranks),
        "r": r,
        "ranks": sum(record.ranks.values()),
        "building_s": built,
        "round_s": statistics.median(seconds[1:]),
        "more_bytes": resident_bytes() - before,
        "entry_bytes": len(json.dumps(dataclasses.asdict(record.rounds[-1]))),
    }


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
