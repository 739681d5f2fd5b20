"""Changing the ranks of a finished adapter: fewer by importance or singular values, or more."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralloc.adapters.folder import read_adapter
from loralloc.adapters.forms import check_shapes
from loralloc.allocation.choices import check_scores, measured_by
from loralloc.allocation.comparison import divide
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import (
    lora_config,
    lora_layers,
    rank_cost,
    ranks,
    weights_ab,
    weights_b,
)
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Plan
from loralloc.allocation.refusals import ScoringError
from loralloc.allocation.resize import resize, write_patterns
from loralloc.allocation.singular import singular_form
from loralloc.methods.gated import keep_highest
from loralloc.runs.exporting import linear_shapes
from loralloc.runs.folder import (
    CHAT_TEMPLATE,
    CONVERSATION,
    LABELS,
    SETTINGS,
    TOKENIZER,
    saved_labels,
)
from loralloc.runs.run import prepare
from loralloc.runs.settings import resolve
from loralloc.runs.verifying import (
    TOLERANCE,
    Source,
    largest_difference,
    logits_of,
    named_beside,
    open_on,
    rows_for,
    written_beside,
)
from loralloc.training.batches import held_out

WAYS = ("singular-values", "scores")
"""By what ranks are chosen that go."""

SCORING_EXAMPLES = 32
"""Held-out examples that importance is measured on."""

JUDGING_EXAMPLES = 256
"""Held-out examples that the loss is told on, beside these."""

BESIDE = (LABELS, CONVERSATION, CHAT_TEMPLATE, SETTINGS, *TOKENIZER)
"""What goes along from a run's folder, so that it can be evaluated."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for: one of the three."""

    rank: int | None = None
    """The rank of every module."""

    params: int | None = None
    """Most parameters of all A and B together."""

    energy: float | None = None
    """The least share of the sum of squared singular values that each module keeps."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Not one is given, or it is out of range.
        """
        given = [name for name in ("rank", "params", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Of `--rank`, `--params` and `--energy` {len(given)} are given; give one."
            )
        least = min(value for value in (self.rank, self.params, 1) if value is not None)
        if least < 1:
            raise ValueError(f"`--{given[0]}` is {least}; it must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"`--energy` is {self.energy}; it must be above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What a resize came to."""

    path: Path
    """The folder."""

    before: Mapping[str, int]
    """Ranks of the modules as they were."""

    after: Mapping[str, int]
    """As they are."""

    losses: tuple[float, float] | None
    """Mean held-out loss before and after, where data was given."""


def resize_folder(
    folder: Path,
    target: Target,
    *,
    data: Sequence[str] = (),
    by: str = "singular-values",
    output: Path | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    judging_examples: int = JUDGING_EXAMPLES,
) -> Resized:
    """Write an adapter with other ranks; more of them train on from zero.

    Modules that lose ranks take their singular form first, in which B A is the same. The ranks of
    the smallest singular values of scaling * B A go, or where it is asked for those of the lowest
    AB-LoRA importance (Liu et al. 2024). New ranks have a drawn row of A and a column of B that is
    zero, so that they add nothing until they are trained.

    Args:
        folder: A run folder, or any folder with a LoRA adapter of PEFT's.
        target: The size that is asked for.
        data: Flags of `loralloc train` that name held-out data, such as `--task` and
            `--dataset_name`; none for no data.
        by: One of `WAYS`; scores need data, and do not go with `energy`.
        output: A folder that is not there yet; by default "FOLDER-resized" beside it.
        base: Another name or place of the backbone than the folder says.
        trust_remote_code: Whether code that comes with the backbone may run.
        seed: Of the examples and of new rows of A.
        judging_examples: About how many held-out examples the loss is told on.

    Raises:
        ValueError: The target cannot be met, or does not go with the way or the data.
        TypeError: The adapter is more than LoRA.
        ScoringError: Importance is not finite.
    """
    _check_way(by, target, has_data=bool(data))
    if output is None:
        output = named_beside(folder, "resized")
    if output.exists():
        raise ValueError(f"{output} is there already; name another `--output_dir`, or remove it.")
    source = Source(folder, base, trust_remote_code)
    adapter = read_adapter(folder)
    backbone = source.load()
    check_shapes(adapter, linear_shapes(backbone))
    adapter.check_plain("ranks are changed of that alone here; name another adapter")
    model = open_on(backbone, folder).eval()
    before = ranks(lora_layers(model))
    scoring, judging = (
        held_out_objectives(model, source, data, seed, judging_examples) if data else (None, None)
    )
    loss_before = judging.mean_loss() if judging else None
    plan = _plan(model, target, scoring if by == "scores" else None)
    resize(model, plan, generator=torch.Generator().manual_seed(seed))
    _declare_commonest(model)
    loss_after = judging.mean_loss() if judging else None
    rows = rows_for(source, model)
    wanted = logits_of(model, rows)
    after = {**dict.fromkeys(before, 0), **ranks(lora_layers(model))}
    with written_beside(output) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        _copy_beside(folder, scratch)
        found = logits_of(open_on(source.load(), scratch).eval(), rows)
        allowed = TOLERANCE * max(1.0, max(float(row.abs().max()) for row in wanted))
        if not largest_difference(found, wanted) <= allowed:
            raise ValueError(
                "The adapter that was written does not compute what it did in memory, so it was "
                "not kept; report it."
            )
    losses = None
    if loss_before is not None and loss_after is not None:
        losses = (loss_before, loss_after)
    return Resized(path=output, before=before, after=after, losses=losses)


def _check_way(by: str, target: Target, *, has_data: bool) -> None:
    if by not in WAYS:
        raise ValueError(f"`--by` is {by!r}; use one of {', '.join(WAYS)}.")
    if by == "scores" and target.energy is not None:
        raise ValueError(
            "`--energy` is a share of squared singular values, and `--by scores` reads none; use "
            "`--rank` or `--params`."
        )
    if by == "scores" and not has_data:
        raise ValueError(
            "`--by scores` measures importance on held-out data, and none is given; name it with "
            "`--task` and `--dataset_name`."
        )


def _plan(model: Any, target: Target, scoring: Objective | None) -> Plan:
    """Which ranks stay, and how many come; what stays is in singular form where values decide."""
    layers = lora_layers(model)
    now, costs = ranks(layers), {name: rank_cost(layer) for name, layer in layers.items()}
    if target.params is not None:
        total = sum(now[name] * cost for name, cost in costs.items())
        if target.params >= total:
            each = (target.params - total) // sum(costs.values())
            if each < 1:
                raise ValueError(
                    f"The adapter has {total:,} parameters and a rank more for every module takes "
                    f"{sum(costs.values()):,}; `--params` is {target.params:,}, which changes "
                    "nothing."
                )
            return _planned(now, {name: tuple(range(n)) for name, n in now.items()}, each)
    wanted = target.rank
    if wanted is not None and min(now.values()) == wanted == max(now.values()):
        raise ValueError(f"Every module has rank {wanted} already; `--rank` changes nothing.")
    loses = wanted is None or max(now.values()) > wanted
    importance = dict[str, Tensor]()
    if loses:
        importance = _singular_values(model, above=wanted or 0)
    if loses and scoring is not None:
        # Of singular directions: ranks as they were trained share what they do.
        importance = _scores(model, scoring, costs, now)
    if wanted is not None:
        kept = {
            name: _largest(importance[name], wanted) if n > wanted else tuple(range(n))
            for name, n in now.items()
        }
        return _planned(now, kept, {name: max(0, wanted - n) for name, n in now.items()})
    if target.energy is not None:
        kept = {name: _energetic(values, target.energy) for name, values in importance.items()}
    else:
        kept = fitting(importance, costs, target.params or 0)
    if not any(kept.values()):
        raise ValueError("No rank would be left; ask for more.")
    return _planned(now, kept, 0)


def _planned(
    now: Mapping[str, int], kept: Mapping[str, tuple[int, ...]], added: int | Mapping[str, int]
) -> Plan:
    more = dict.fromkeys(now, added) if isinstance(added, int) else dict(added)
    gone = {name: tuple(sorted(set(range(n)) - set(kept[name]))) for name, n in now.items()}
    return Plan(
        kept=dict(kept), added=more, pruned={name: each for name, each in gone.items() if each}
    )


def _scores(
    model: Any, scoring: Objective, costs: Mapping[str, int], now: Mapping[str, int]
) -> dict[str, Tensor]:
    """AB-LoRA's importance of every rank, to first order."""
    config = AllocationConfig(score="gradient", scoring_examples=SCORING_EXAMPLES)
    limits = Limits(num_pruned=0, cost=dict(costs))
    trained = weights_b(lora_layers(model))
    for weight in trained.values():
        weight.requires_grad_(True)

    def nothing(scores: Any, limits: Limits, /) -> Plan:
        raise AssertionError("importance to first order asks no policy")

    scores = measured_by(config, nothing)(scoring, trained, limits)
    checked = check_scores(scores, now, config)
    if not checked.is_finite():
        raise ScoringError(
            "Importance is not finite on these data, so that no rank can be chosen by it; check "
            "the data, or use `--by singular-values`."
        )
    return {name: values.detach().cpu() for name, values in checked.importance.items()}


@torch.no_grad()
def _singular_values(model: Any, *, above: int) -> dict[str, Tensor]:
    """Of scaling * B A, the largest first; modules with more ranks than `above` take that form."""
    found = {}
    for name, layer in lora_layers(model).items():
        a, b = weights_ab({name: layer})[name]
        new_b, new_a, values = singular_form(b, a)
        if len(a) > above:
            a.copy_(new_a)
            b.copy_(new_b)
        found[name] = values.cpu() * abs(layer.scaling["default"])
    return found


def _largest(importance: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(importance, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _energetic(values: Tensor, energy: float) -> tuple[int, ...]:
    """The fewest of the largest whose squares have that share; none where all are zero."""
    squares = values.double() ** 2
    if not squares.sum():
        return ()
    # A share of 1 is reached at the last value that counts in double precision.
    shares = squares.cumsum(0) / squares.sum()
    return tuple(range(int((shares < energy * (1 - 1e-12)).sum()) + 1))


def fitting(
    importance: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, tuple[int, ...]]:
    """The most important of all modules together that fit the parameters."""
    lengths = [len(values) for values in importance.values()]
    each = torch.tensor([costs[name] for name in importance]).repeat_interleave(
        torch.tensor(lengths)
    )
    kept = keep_highest(torch.cat(list(importance.values())), each, budget)
    parts = zip(importance, torch.split(kept, lengths), strict=True)
    return {name: tuple(part.nonzero().flatten().tolist()) for name, part in parts}


def held_out_objectives(
    model: Any, source: Source, data: Sequence[str], seed: int, judging_examples: int
) -> tuple[Objective, Objective]:
    """The loss on held-out examples to measure importance on, and on others to tell it.

    The examples are those of a run of LoRA on the same data, as `loralloc train` reads them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        flags = [
            *data,
            *("--model_name_or_path", source.backbone, "--method", "lora", "--lora_r", "1"),
            *("--output_dir", str(Path(scratch) / "run"), "--seed", str(seed)),
        ]
        run = prepare(resolve(flags))
        if run.head is not source.head:
            raise ValueError(
                f"The data makes a {run.head.name} head, and the adapter in {source.folder} is for "
                f"{source.head.name}; name data of its own kind."
            )
        _check_labels(run.labels, source.folder)
        number = SCORING_EXAMPLES + judging_examples
        rows, _ = held_out(run.trainer, run.trainer.eval_dataset, num_examples=number, seed=seed)
    return divide(Objective(model, rows), SCORING_EXAMPLES)


def _declare_commonest(model: Any) -> None:
    """Let `r` be the rank of most modules: an adapter of one rank everywhere needs no pattern."""
    config, layers = lora_config(model), lora_layers(model).values()
    pairs = Counter((layer.r["default"], layer.lora_alpha["default"]) for layer in layers)
    config.r, config.lora_alpha = pairs.most_common(1)[0][0]
    write_patterns(model)


def _check_labels(found: Sequence[str], folder: Path) -> None:
    """Refuse data whose labels have other numbers than the adapter's.

    Raises:
        ValueError: Naming both.
    """
    own = saved_labels(folder) if (folder / LABELS).is_file() else list(found)
    if list(found) != own:
        raise ValueError(
            f"The data has the labels {', '.join(found)}, and the run in {folder} knows "
            f"{', '.join(own)}; give data that has these."
        )


def _copy_beside(folder: Path, scratch: Path) -> None:
    for name in BESIDE:
        path = folder / name
        if path.is_dir():
            shutil.copytree(path, scratch / name)
        elif path.is_file():
            shutil.copyfile(path, scratch / name)
