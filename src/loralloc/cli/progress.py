"""What a person sees while a run trains."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralloc.allocation import replicas
from loralloc.allocation.module_names import by_kind
from loralloc.allocation.record import Round
from loralloc.cli.console import Console, counted
from loralloc.cli.token_count import TokenCount
from loralloc.methods.method import Method
from loralloc.runs.flags import left_to_us
from loralloc.runs.quiet import prepare_process as prepare_process
from loralloc.training.way_of_running import planned_length

if TYPE_CHECKING:
    from loralloc.runs.run import Run


EVERY_S = 0.5
"""Seconds between two updates of the rates: counting tokens waits for a GPU."""

GLUE = "\N{NO-BREAK SPACE}"
FEWER, MORE = "red", "blue"
"""Colours of modules that lose ranks and of those that gain, as in the table of ranks."""


class Progress:
    """A bar with the loss, and a line for every evaluation and every round above it."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self.console = console
        self._has_explained_churn = False
        self.bar = Bar(
            # What there is beside the words, which take 74 columns in long runs.
            BarColumn(bar_width=max(6, min(20, console.width - 74))),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
        )

    def introduce(self, run: Run) -> None:
        """Say what will be trained."""
        if note := left_to_us(run.settings):
            self._say(note)
        model, method = run.model, run.method
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        device = model.device.type
        where = f"cpu ({counted(torch.get_num_threads(), 'thread')})" if device == "cpu" else device
        if replicas.count() > 1:
            where += f", in {replicas.count()} processes"
        self._say(
            f"{run.settings.model.model_name_or_path} in {dtype} on {where}, {sized(method)}: "
            f"{method.num_trained():,} parameters train"
        )
        num_steps = planned_length(run.trainer).num_steps
        if search := method.search_steps(num_steps):
            self._say(f"{search} steps search, on top of {num_steps} that train what was found")
        if run.allocation:
            record = run.allocation.record
            rounds = record.round_steps or ()
            start = record.initial_ranks
            places = "step" if len(rounds) == 1 else "steps"
            self._say(
                f"{sum(start.values()):,} ranks in {counted(len(start), 'module')}; "
                f"{counted(len(rounds), 'round')} of "
                f"{run.allocation.round_in_words}, after {places} {', '.join(map(str, rounds))}"
            )
            if record.note:
                self._say(record.note)

    def conclude(self, run: Run) -> None:
        """Say what one task keeps, how far that is from the budget, and what the method found."""
        method = run.method
        over = method.over_budget()
        beside = "" if over is None else f", {over:+.1%} of the budget of {method.sized_for:,}"
        self._say(f"{method.num_stored():,} parameters kept{beside}")
        if found := method.findings():
            named = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
            self._say(f"{method.about.name}: {', '.join(named)}")

    def _say(self, line: str, *, style: str | None = None) -> None:
        self.console.print(line, highlight=False, style=style)

    def take_over(self, trainer: Trainer) -> None:
        """Show this trainer's progress, in place of its own display."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_BarCallback(self, TokenCount(trainer)))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar while a trainer trains, taken away whatever ends it."""
        try:
            yield
        finally:
            self.bar.stop()

    def show_round(self, entry: Round) -> None:
        """A round: pruned from, given to, the share of the last given that went, time.

        Two aligned lines where a person reads them, and one in a log file.
        """
        lost = {name: len(indices) for name, indices in entry.pruned.items()}
        modules = entry.ranks_before
        if self.console.is_terminal:
            self._show_two_lines(entry, _by_kind(lost, modules), _by_kind(entry.added, modules))
            return
        parts = [
            f"round {entry.round}",
            f"step {entry.step}",
            f"pruned {_by_kind(lost, modules) or 'none'}",
        ]
        if entry.added:
            parts.append(f"given to {_by_kind(entry.added, modules)}")
        if entry.lost:
            parts += ["no receiver", f"{entry.lost} lost"]
        if entry.churn is not None:
            parts.append(f"churn {entry.churn:.0%}")
        if entry.score == "screened" and not entry.settled:
            parts.append("first order")
        line = " | ".join([*parts, f"{entry.seconds:.1f} s"])
        self.console.print(line, highlight=False, soft_wrap=True)

    def _show_two_lines(self, entry: Round, pruned: str, given: str) -> None:
        if entry.churn is not None and not self._has_explained_churn:
            self._say("churn: the share of the ranks given last that is pruned again", style="dim")
            self._has_explained_churn = True
        notes = [f"{entry.seconds:.1f} s"]
        if entry.churn is not None:
            notes.insert(0, f"churn {entry.churn:.0%}")
        if entry.score == "screened" and not entry.settled:
            notes.append("first order")
        if entry.lost:
            given += f"{', ' if given else ''}no receiver: {entry.lost} lost"
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_column(no_wrap=True)
        lines.add_column()
        heads = (f"round {entry.round}, step {entry.step}", ", ".join(notes))
        room = self.console.width - max(map(len, heads)) - len("given to") - 6
        told = (("pruned", pruned or "none", FEWER), ("given to", given or "none", MORE))
        for head, (verb, words, style) in zip(heads, told, strict=True):
            lines.add_row(head, verb, Text(_filled(words, room), style=style))
        self.console.print(lines, highlight=False)


class _BarCallback(TrainerCallback):
    """Feeds the bar from a trainer."""

    def __init__(self, progress: Progress, tokens: TokenCount) -> None:
        self._progress = progress
        self._tokens = tokens
        self._told, self._rates = 0.0, ""
        self._task: Any = None
        self._begin = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begin, self._first = time.perf_counter(), state.global_step
        self._progress.bar.start()
        self._task = self._progress.bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, loss="", rate=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        now = time.perf_counter()
        if now - self._told > EVERY_S:
            self._told, self._rates = now, self._in_words(state)
        self._progress.bar.update(self._task, completed=state.global_step, rate=self._rates)

    def _in_words(self, state: TrainerState) -> str:
        """Such as "1.2 steps/s 830 tok/s"; without tokens where the batches have none."""
        tokens = self._tokens.total() / (time.perf_counter() - self._begin)
        steps = f"{self._rate(state):.2g} steps/s"
        return f"{steps} {float(f'{tokens:.3g}'):,.0f} tokens/s" if tokens else steps

    def _rate(self, state: TrainerState) -> float:
        """Optimiser steps a second since training began, all else that it does included."""
        seconds = time.perf_counter() - self._begin
        return float((state.global_step - self._first) / seconds)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            loss = f"loss {float(logs['loss']):.3f}"
            self._progress.bar.update(self._task, loss=loss)
            if not self._progress.console.is_terminal:  # a log file shows no bar
                rate = self._rate(state)
                left = (state.max_steps - state.global_step) / rate if rate else 0.0
                self._progress.console.print(
                    f"step {state.global_step}  {loss}  {self._in_words(state)}  "
                    f"{in_time(left)} left",
                    highlight=False,
                )
        if "held_out_loss" in logs:
            worse = logs["held_out_worse_by"]
            cost = f", {worse:+.4f} at once" if worse else ""
            self._progress.console.print(
                f"step {state.global_step}  {int(logs['parameters']):,} parameters: held-out loss "
                f"{logs['held_out_loss']:.4f}{cost}",
                highlight=False,
            )
        if "eval_loss" in logs:
            kinds = {"eval_accuracy": "accuracy", "eval_mean_token_accuracy": "token accuracy"}
            found = (f"  {name} {logs[key]:.3f}" for key, name in kinds.items() if key in logs)
            shown = next(found, "")
            self._progress.console.print(
                f"step {state.global_step}  development loss {logs['eval_loss']:.4f}{shown}",
                highlight=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._progress.bar.stop()
        self._progress.console.print(
            f"{state.global_step} steps in {time.perf_counter() - self._begin:.0f} s",
            highlight=False,
        )


def in_time(seconds: float) -> str:
    """Such as "0:40" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sized(method: Method) -> str:
    """A method with its size: "houlsby with bottleneck 12"."""
    name, size = method.about.name, method.size.replace("_", " ")
    return f"{name} with {size} {method.chosen_size()}" if size else name


def _filled(words: str, width: int) -> str:
    """Lines that end behind a comma: a module and its count stay together."""
    joined = ",".join(part.replace(" ", GLUE) for part in words.split(","))
    return textwrap.fill(joined.replace("," + GLUE, ", "), max(width, 20)).replace(GLUE, " ")


def _by_kind(counts: Mapping[str, int], modules: Iterable[str]) -> str:
    """Ranks by module kind over all layers, the most first: "v_proj 3, q_proj 2"."""
    totals = Counter(by_kind(counts, modules))
    return ", ".join(f"{label} {count}" for label, count in totals.most_common() if count)
