"""Whatever the options of new ranks: the budget is kept, and giving ranks changes nothing."""

import copy

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost, weight_b

OPTIONS = st.fixed_dictionaries(
    {
        "newborns": st.sampled_from(["compete", "protected", "potential"]),
        "new_state": st.sampled_from(["zero", "survivors"]),
        "new_rows": st.sampled_from(["kaiming", "gradient"]),
        "policy": st.sampled_from(["paper", "worth"]),
        "budget": st.sampled_from(["ranks", "parameters"]),
        "rank_lr_power": st.sampled_from([0.0, 0.5]),
        "ranks_per_round": st.integers(1, 9),
        "max_rank": st.sampled_from([None, 4]),
        "grace_rounds": st.integers(0, 1),
    }
)


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@given(OPTIONS, st.sampled_from([tiny.llama, tiny.gpt2, tiny.bert_classifier]))
@settings(max_examples=8, deadline=None)
def test_the_budget_is_kept_and_what_is_given_changes_no_output(options, build):
    model = tiny.adapted(build(), r=3)
    optimizer, batch = tiny.optimizer_for(model), tiny.batch_for(model)
    allocator = Allocator(model, AllocationConfig(min_rank=1, **options), [batch])
    allocator.begin(optimizer)
    parameters = options["budget"] == "parameters"
    cost = {n: rank_cost(x) if parameters else 1 for n, x in lora_layers(model).items()}
    left = 3 * sum(cost.values())
    for step in (2, 3):
        tiny.train(model, batch, 2, optimizer)
        before = copy.deepcopy(model)
        entry = allocator.step(optimizer, step=step)
        left -= entry.lost
        spent = sum(cost[name] * rank for name, rank in entry.ranks_after.items())
        assert spent + entry.spare == left
        # What is left of the function once the pruned ranks are switched off.
        with torch.no_grad():
            for name, gone in entry.pruned.items():
                weight_b(lora_layers(before)[name])[:, gone] = 0
        torch.testing.assert_close(outputs(model, batch), outputs(before, batch))
