"""Which ranks to use, from short runs: the smallest pattern, and what doubling r would buy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loralloc.adapters.pattern import Pattern
from loralloc.allocation.comparison import ExampleLosses, example_losses
from loralloc.allocation.layers import lora_layers
from loralloc.allocation.record import Record, Round
from loralloc.allocation.shrinking import Difference, in_words, paired_difference
from loralloc.runs.arguments import BLOCK, OPTIONS
from loralloc.runs.run import Run, prepare
from loralloc.runs.settings import Settings, resolve
from loralloc.training import batches, loss

FILES = {
    "peft.json": Pattern.peft_json,
    "axolotl.yaml": Pattern.axolotl_yaml,
    "llama_factory.yaml": Pattern.llama_factory_yaml,
    "trl.txt": Pattern.trl_flags,
}
"""What the answer is written to, and by what."""

ANSWER = "search.json"
"""All numbers of the answer."""


@dataclass(frozen=True, kw_only=True)
class Doubling:
    """LoRA with twice the rank beside LoRA, trained alike."""

    rank: int
    """Of the smaller."""

    parameters: int
    """Of the smaller; the larger has twice as many."""

    loss: float
    """Held-out loss of the smaller, a target."""

    difference: Difference
    """From the smaller to the larger, example by example; below 0 where doubling helps."""

    def in_words(self) -> str:
        """What it comes to, in a sentence."""
        gain, error = -self.difference.mean, self.difference.standard_error
        verb = "would buy" if gain > 0 else "would cost"
        return (
            f"r = {2 * self.rank} instead of {self.rank} {verb} {abs(gain):.4f} ± {error:.4f} of "
            f"the held-out loss of {self.loss:.4f}, for {self.parameters:,} parameters more."
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found."""

    pattern: Pattern
    record: Record
    """Of the run that shrank, with the sizes that it passed."""

    doubling: Doubling | None
    """None where it was not asked for."""

    def save(self, folder: Path) -> None:
        """Write the pattern in every trainer's words, and all numbers."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in FILES.items():
            (folder / name).write_text(write(self.pattern).rstrip() + "\n", encoding="utf-8")
        numbers = {
            "sentence": in_words(self.record),
            "ranks": dict(self.pattern.ranks),
            "scaling": self.pattern.scaling,
            "frontier": [asdict(size) for size in self.record.frontier],
            "doubling": None
            if self.doubling is None
            else {**asdict(self.doubling), "difference": self.doubling.difference._asdict()},
        }
        (folder / ANSWER).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def search(
    settings: Settings,
    *,
    num_steps: int,
    doubles: bool = True,
    on_run: Callable[[Run], None] | None = None,
    on_round: Callable[[Round], None] | None = None,
    on_shrunk: Callable[[Answer], None] | None = None,
) -> Answer:
    """Shrink LoRA in a short run, and train LoRA with r and 2r as long beside it.

    Nothing but the answer is kept: no adapter, no checkpoint.

    Args:
        settings: Of the run that the ranks are for; of its length only the batch is read.
        num_steps: Optimiser steps of each run, which see that many batches of the training rows.
        doubles: Whether to find out what doubling r would buy, in two more runs.
        on_run: Called with each run before it trains.
        on_round: Called with each round of the run that shrinks.
        on_shrunk: Called with the answer as it is before the runs that double r.

    Raises:
        ValueError: The settings ask for another method, or do not fit together.
    """
    if settings.gives("method") and settings.run.method != "shrink":
        raise ValueError(
            f"`method` is {settings.run.method!r}, but a search shrinks LoRA; leave it out."
        )
    if settings.model.lora_target_parameters:
        raise ValueError(
            "`lora_target_parameters` is given, and a search writes its ranks in the words of "
            "trainers that have them for linear layers only; use `--method shrink`, whose adapter "
            "PEFT opens."
        )
    shrunk = _run(settings, "shrink", num_steps, {}, on_round)
    _train(shrunk, on_run)
    assert shrunk.allocation is not None, "shrink allocates"
    layers = lora_layers(shrunk.model)
    scaling = next(iter(layers.values())).scaling["default"]
    record = shrunk.allocation.record
    pattern = Pattern(ranks=record.ranks, scaling=float(scaling))
    answer = Answer(pattern=pattern, record=record, doubling=None)
    if on_shrunk:
        on_shrunk(answer)
    return replace(answer, doubling=_doubling(settings, num_steps, on_run)) if doubles else answer


def _doubling(settings: Settings, num_steps: int, on_run: Callable[[Run], None] | None) -> Doubling:
    rank, alpha = settings.model.lora_r, settings.model.lora_alpha
    found = []
    for times in (1, 2):
        options = {"lora_r": times * rank, "lora_alpha": times * alpha}
        run = _run(settings, "lora", num_steps, options)
        _train(run, on_run)
        found.append((_held_out(run, settings), run.method.num_stored()))
    (first, parameters), (second, _) = found
    return Doubling(
        rank=rank,
        parameters=parameters,
        loss=first.mean,
        difference=paired_difference(first.sums, second.sums, first.counts),
    )


def _run(
    settings: Settings,
    method: str,
    num_steps: int,
    changes: Mapping[str, Any],
    on_round: Callable[[Round], None] | None = None,
) -> Run:
    """A short run of a method, ready to train."""
    given = {name: value for name, value in settings.given.items() if settings.gives(name)}
    if method == "lora":
        own = (f"{BLOCK}.", f"{OPTIONS}.")
        given = {name: value for name, value in given.items() if not name.startswith(own)}
    options = {
        **given,
        "method": method,
        "max_steps": num_steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        **changes,
    }
    return prepare(resolve(options), overwrite=True, on_round=on_round)


def _train(run: Run, on_run: Callable[[Run], None] | None) -> None:
    """Train without a run folder."""
    if on_run:
        on_run(run)
    run.trainer.train()


def _held_out(run: Run, settings: Settings) -> ExampleLosses:
    """Losses of a trained run on the examples that sizes are judged by."""
    trainer = run.trainer
    seed = settings.allocation.seed
    rows, _ = batches.held_out(
        trainer,
        trainer.eval_dataset,
        num_examples=settings.allocation.judging_examples,
        seed=trainer.args.seed if seed is None else seed,
    )
    return example_losses(loss.objective(trainer, rows))
