"""Held-out losses example by example, and how the examples are divided."""

import pytest
import tiny
import torch
from torch.nn import functional

from loralloc.allocation.comparison import divide, example_losses, losses_without, with_batches
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective


@pytest.fixture(params=[tiny.llama, tiny.bert_classifier], ids=["causal", "classes"])
def objective(request):
    model = tiny.with_trained_b(tiny.adapted(request.param()))
    return Objective(model, tiny.micro_batches(tiny.batch_for(model, num_examples=6), 2))


def test_each_example_has_the_loss_that_it_has_alone(objective):
    found = example_losses(objective)
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in objective.batches
        for i in range(len(batch["labels"]))
    ]
    for row, total, count in zip(rows, found.sums, found.counts, strict=True):
        with torch.no_grad():
            logits = objective.model(**row).logits
        labels = row["labels"]
        if labels.ndim == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        expected = functional.cross_entropy(logits, labels, reduction="sum")
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        assert int(count) == int((labels != tiny.IGNORED).sum())
    with objective.evaluating():
        assert found.mean == pytest.approx(objective.mean_loss(), rel=1e-6)


def test_ranks_are_switched_off_and_on_again_to_the_bit(objective):
    layers = lora_layers(objective.model)
    before = {name: w.detach().clone() for name, w in weights_b(layers).items()}
    name = next(iter(layers))
    found = losses_without(objective, {name: (1, 3)}, {}, adapter_name="default")
    assert all(torch.equal(w, before[n]) for n, w in weights_b(layers).items())
    with torch.no_grad():
        weights_b(layers)[name][:, [1, 3]] = 0
    assert torch.equal(found.sums, example_losses(objective).sums)


def test_where_no_more_than_a_mean_is_known_a_batch_is_one():
    model = tiny.adapted(tiny.llama())
    batches = tiny.micro_batches(tiny.causal_batch(6), 2)
    objective = Objective(model, batches, loss=lambda batch: torch.tensor(float(len(batch))))
    found = example_losses(objective)
    assert len(found.sums) == 3
    assert found.counts.tolist() == [objective.count_targets(batch) for batch in batches]
    assert found.mean == pytest.approx(3.0)


def test_it_leaves_the_model_as_it_trains(objective):
    objective.model.train()
    example_losses(objective)
    assert all(module.training for module in objective.model.modules())


@pytest.mark.parametrize(
    ("num_examples", "sizes"), [(0, (0, 3)), (1, (1, 2)), (2, (1, 2)), (99, (1, 2))]
)
def test_examples_are_divided_without_overlap(num_examples, sizes, objective):
    first, second = divide(objective, num_examples)
    assert (len(first.batches), len(second.batches)) == sizes
    both = [*map(id, first.batches), *map(id, second.batches)]
    assert sorted(both) == sorted(map(id, objective.batches))
    assert first.num_targets + second.num_targets == objective.num_targets
    assert len(objective.batches) == 3


def test_a_single_batch_serves_for_both(objective):
    one = with_batches(objective, objective.batches[:1])
    first, second = divide(one, 2)
    assert first.batches == second.batches == one.batches
