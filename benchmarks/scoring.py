"""Scoring a round: paper-literal, prefix-shared, gradient, screened, shapley; speed and agreement.

SmolLM2-135M in float32 (in bfloat16 a loss is rounded more coarsely than one rank changes it), LoRA
on all 210 linears, after a few steps of training, scored on held-out rows of SST-2 and E2E.

    literal     eq. 6 as printed: two whole forward passes a rank, gates by hooks, the model's own
                loss with PEFT's layers; timed on a sample of ranks and scaled to all
    prefix      the library's `ablation`; timed on a sample of ranks in every part of the depth and
                scaled to all
    gradient, screened, shapley     the library's, timed as they are, on all ranks

Run: python benchmarks/scoring.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import harness
import torch
from scipy.stats import spearmanr
from torch import nn

from loralloc.allocation.blocks import block_list
from loralloc.allocation.importance import ablation, gradient, screened, shapley
from loralloc.allocation.layers import base_model, lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores, choose_pruned
from loralloc.allocation.supervised import IGNORED
from loralloc.kernels.lora import fuse, unfuse
from loralloc.training.batches import draw
from tests.reference.importance import gates_all, performance

NUM_PRUNED = 7
LIMITS = Limits(num_pruned=NUM_PRUNED)
BATCH = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    results = {
        task: measure(task, data, quick=args.quick)
        for task, data in harness.data_sets(args.data).items()
    }
    task, data = next(iter(harness.data_sets(args.data).items()))
    growth = grow(task, data, repeats=1 if args.quick else 5, warmup=int(not args.quick))
    for task, result in results.items():
        show(task, result)
    for what, seconds in growth.items():
        rows = [(size, statistics.median(taken)) for size, taken in seconds.items()]
        harness.show(f"gradient on {next(iter(results))}: growth with {what}", (what, "s"), rows)
    ratios = {
        f"speedup_{name}": min(result[f"speedup_{name}"] for result in results.values())
        for name in ("gradient", "screened", "prefix")
    }
    harness.write(
        args.json,
        {
            "quick": args.quick,
            "dtype": "float32",
            **ratios,
            "spearman": min(result["spearman"] for result in results.values()),
            "pruned_set_equal": all(result["pruned_set_equal"] for result in results.values()),
            "cost_ratio_r32_over_r8": harness.ratio(growth["rank"]["32"], growth["rank"]["8"]),
            "tasks": results,
            "growth_s": growth,
        },
    )


def measure(task: str, data: str, *, quick: bool) -> dict[str, Any]:
    """Seconds and agreement of every way to score, on one task."""
    num_steps, num_examples, num_literal, num_sampled, num_lowest = (
        (4, 8, 2, 14, 16) if quick else (120, 32, 8, 70, 100)
    )
    run, objective = prepared(task, data, num_examples=num_examples)
    train(run, num_steps)
    weights = weights_b(lora_layers(run.model))
    names = list(weights)
    total = sum(b.shape[1] for b in weights.values())

    first_order, gradient_s = harness.timed(lambda: gradient.score(objective, weights, LIMITS))
    settled, screened_s = harness.timed(lambda: screened.score(objective, weights, LIMITS))
    shares, shapley_s = harness.timed(lambda: shapley.score(objective, weights, LIMITS))

    # Ranks at even distances through the depth stand for all: each kind of module at each height.
    sample = {
        names[int((k + 0.5) * len(names) / num_sampled)]: [k % weights[names[0]].shape[1]]
        for k in range(num_sampled)
    }
    _, fixed_s = harness.timed(lambda: ablation.measure(objective, weights, {}))
    exact, sampled_s = harness.timed(lambda: ablation.measure(objective, weights, sample))
    prefix_s = fixed_s + (sampled_s - fixed_s) / num_sampled * total
    few = dict(list(sample.items())[:: num_sampled // num_literal][:num_literal])
    literal, literal_s = harness.timed(lambda: literal_importance(objective, few))
    literal_s *= total / len(few)

    lowest = lowest_ranks(first_order, num_lowest)
    checked = put_in(first_order, ablation.measure(objective, weights, lowest), lowest)
    improvement = shares.s_full - shares.s_base
    seconds = {
        "literal": literal_s,
        "prefix": prefix_s,
        "screened": screened_s,
        "gradient": gradient_s,
        "shapley": shapley_s,
    }
    return {
        "ranks": total,
        "training_steps": num_steps,
        "scoring_examples": num_examples,
        "tokens": [list(batch["input_ids"].shape) for batch in objective.batches],
        "supervised_tokens": objective.num_targets,
        "seconds": seconds,
        "literal_timed_on": len(few),
        "prefix_timed_on": num_sampled,
        **{f"speedup_{name}": literal_s / s for name, s in seconds.items() if name != "literal"},
        "spearman": spearman(first_order, exact, sample),
        "largest_difference_prefix_literal": max(
            abs(float(exact.importance[name][i]) - value) for (name, i), value in literal.items()
        ),
        "largest_importance": max(abs(value) for value in literal.values()),
        "exact_near_the_cut": num_lowest,
        "pruned_set_equal": choose_pruned(settled.importance, LIMITS)
        == choose_pruned(checked, LIMITS),
        "verified": sum(map(len, settled.verified.values())),
        "settled": settled.settled,
        "shapley_sum_over_improvement": sum(float(x.sum()) for x in shares.terms["share"].values())
        / improvement,
        "improvement": improvement,
    }


def prepared(task: str, data: str, *, num_examples: int, **options: Any) -> tuple[Any, Objective]:
    """A run in float32 and its scoring batch."""
    small = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3}
    run = harness.prepare(task, data, dtype="float32", **small, **options)
    held_out = run.trainer.eval_dataset
    batches = draw(run.trainer, held_out, num_examples=num_examples, seed=0)
    return run, Objective(run.model, [harness.on_device(batch) for batch in batches])


def train(run: Any, num_steps: int) -> None:
    """A few steps, so that there is something to score."""
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=run.settings.training.learning_rate)
    run.model.train()
    batches = iter(run.trainer.get_train_dataloader())
    for _ in range(num_steps):
        run.trainer.compute_loss(run.model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.model.eval()


@torch.no_grad()
def literal_importance(
    objective: Objective, sample: dict[str, list[int]]
) -> dict[tuple[str, int], float]:
    """Eq. 6 as printed for the sampled ranks, less the constant S(M_0), which costs no extra pass.

    S(M) and S(M_0) are one pass each for all ranks, and not what a rank costs: they are taken from
    the library's own loss.
    """
    model = objective.model

    def s(gates: dict[str, torch.Tensor]) -> float:
        total = 0.0
        for batch in objective.batches:
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += count * float(performance(model, batch, gates))
        return total / objective.num_targets

    importance = {}
    s_full = -objective.mean_loss()
    with model.disable_adapter():
        s_base = -objective.mean_loss()
    unfuse(model)  # gates are hooks on A, which the fused step does not call
    for name, indices in sample.items():
        for index in indices:
            without, only = gates_all(model, 1.0), gates_all(model, 0.0)
            without[name][index], only[name][index] = 0.0, 1.0
            importance[name, index] = s_full - s(without) + s(only) - s_base
    fuse(model)
    return importance


def lowest_ranks(scores: Scores, count: int) -> dict[str, list[int]]:
    """The ranks with the lowest scores, by module."""
    pairs = sorted(
        (float(x), name, i)
        for name, values in scores.importance.items()
        for i, x in enumerate(values)
    )[:count]
    return {name: sorted(i for _, n, i in pairs if n == name) for _, name, _ in pairs}


def put_in(scores: Scores, exact: Scores, chosen: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Importance with exact values for the chosen ranks."""
    importance = {name: x.double().clone() for name, x in scores.importance.items()}
    for name, indices in chosen.items():
        importance[name][indices] = exact.importance[name][indices].double()
    return importance


def spearman(a: Scores, b: Scores, sample: dict[str, list[int]]) -> float:
    """Rank correlation on the sampled ranks."""
    left = [float(a.importance[name][i]) for name in sample for i in sample[name]]
    right = [float(b.importance[name][i]) for name in sample for i in sample[name]]
    return float(spearmanr(left, right).statistic)


def grow(task: str, data: str, *, repeats: int, warmup: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of gradient scoring by rank, by depth and by examples."""
    contestants = {}
    for rank in (2, 8, 32):
        run, objective = prepared(task, data, num_examples=16, lora_r=rank, lora_alpha=2 * rank)
        run.model.eval()
        contestants[str(rank)] = scorer(run.model, objective)
    by_rank = harness.by_turns(contestants, repeats=repeats)

    run, _ = prepared(task, data, num_examples=16)
    held_out = run.trainer.eval_dataset
    by_examples = harness.by_turns(
        {
            str(count): scorer(
                run.model,
                Objective(
                    run.model,
                    draw(run.trainer, held_out, num_examples=count, seed=0),
                ),
            )
            for count in (8, 16, 32)
        },
        repeats=repeats,
        warmup=warmup,
    )
    return {
        "rank": by_rank,
        "examples": by_examples,
        "blocks": by_depth(run, repeats=repeats, warmup=warmup),
    }


def by_depth(run: Any, *, repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of gradient scoring on the first blocks of the model."""
    batches = draw(run.trainer, run.trainer.eval_dataset, num_examples=16, seed=0)
    inner: Any = base_model(run.model)
    found = block_list(run.model, lora_layers(run.model))
    assert found
    name, blocks = found
    parent = inner.get_submodule(name.rpartition(".")[0])

    def first(count: int) -> Any:
        def score() -> None:
            parent.layers = nn.ModuleList(list(blocks)[:count])
            inner.config.num_hidden_layers = count
            try:
                scorer(run.model, Objective(run.model, batches))()
            finally:
                parent.layers, inner.config.num_hidden_layers = blocks, len(blocks)

        return score

    counts = (len(blocks) // 3, 2 * len(blocks) // 3, len(blocks))
    contestants = {str(count): first(count) for count in counts}
    return harness.by_turns(contestants, repeats=repeats, warmup=warmup)


def scorer(model: nn.Module, objective: Objective) -> Any:
    """Gradient scoring of all ranks, to be timed."""
    return lambda: gradient.score(objective, weights_b(lora_layers(model)), LIMITS)


def show(task: str, result: dict[str, Any]) -> None:
    """One task's table."""
    literal = result["seconds"]["literal"]
    harness.show(
        f"scoring {result['ranks']} ranks of smollm2-135m on {result['scoring_examples']} "
        f"{task} examples, float32",
        ("", "seconds", "times faster than literal"),
        [(name, s, literal / s) for name, s in result["seconds"].items()],
    )
    keys = ("spearman", "pruned_set_equal", "verified", "shapley_sum_over_improvement")
    harness.show("agreement", ("", ""), [(key, result[key]) for key in keys])


if __name__ == "__main__":
    main()
