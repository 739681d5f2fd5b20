import math

import pytest
import tiny
import torch

from loralloc.allocation.layers import lora_config, lora_layers, ranks, weight_a, weight_b
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize

FIRST = "model.layers.0.self_attn.q_proj"


def plan_for(model, **moves) -> Plan:
    """Modules in turn lose ranks, receive, do both, stay, and are emptied."""
    kept, added, pruned = {}, {}, {}
    for number, (name, rank) in enumerate(ranks(lora_layers(model)).items()):
        everything = tuple(range(rank))
        kept[name] = [everything[1::2], everything, everything[:1], everything, ()][number % 5]
        added[name] = [0, 3, 2, 0, 0][number % 5]
        if gone := tuple(sorted(set(everything) - set(kept[name]))):
            pruned[name] = gone
    return Plan(kept=kept, added=added, pruned=pruned)


def zero_pruned(model, plan):
    """Gate the pruned ranks off, after which taking them out may change nothing."""
    with torch.no_grad():
        for name, indices in plan.pruned.items():
            weight_b(lora_layers(model)[name])[:, list(indices)] = 0


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


# The function.


@pytest.mark.parametrize("build", tiny.MODELS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_rslora=True),
        dict(lora_alpha=7),  # alpha of the new ranks is no whole number
        dict(use_rslora=True, lora_alpha=7),
        dict(rank_pattern={"c_fc|query|q_proj": 6}, lora_dropout=0.5),
    ],
    ids=["plain", "rslora", "odd_alpha", "odd_rslora", "pattern"],
)
def test_the_function_stays_when_pruned_ranks_did_nothing(build, options):
    model = tiny.with_trained_b(tiny.adapted(build(), **options))
    batch, plan = tiny.batch_for(model), plan_for(model)
    zero_pruned(model, plan)
    before = logits(model, batch)
    resize(model, plan)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=3e-5)


def test_the_function_stays_under_a_bfloat16_backbone():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama().bfloat16()))
    batch, plan = tiny.batch_for(model), plan_for(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    zero_pruned(model, plan)
    before = logits(model, batch)
    resize(model, plan)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # Sums over more or fewer zeros round in bfloat16 as they did, but for the last bit.
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=0.05)


def test_adapters_of_a_low_precision_keep_it():
    model = tiny.adapted(tiny.llama()).bfloat16()
    resize(model, 6)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


# Ranks that stay, and new ones.


def test_ranks_that_stay_keep_their_bits_and_new_ones_follow():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    layer = lora_layers(model)[FIRST]
    a, b = weight_a(layer).detach().clone(), weight_b(layer).detach().clone()
    resize(model, Plan(kept={FIRST: (1, 3)}, added={FIRST: 3}, pruned={FIRST: (0, 2)}))
    assert torch.equal(weight_a(layer)[:2], a[[1, 3]])
    assert torch.equal(weight_b(layer)[:, :2], b[:, [1, 3]])
    assert weight_a(layer).shape == (5, 32)
    assert weight_b(layer).shape == (32, 5)
    assert not weight_b(layer)[:, 2:].any()


def test_modules_that_the_plan_leaves_alone_keep_their_very_parameters():
    model = tiny.adapted(tiny.llama())
    before = {name: weight_a(layer) for name, layer in lora_layers(model).items()}
    resize(model, {FIRST: 6})
    for name, layer in lora_layers(model).items():
        assert (weight_a(layer) is before[name]) == (name != FIRST)


def test_new_rows_of_a_are_kaiming_uniform():
    model = tiny.adapted(tiny.llama())
    resize(model, 200, generator=torch.Generator().manual_seed(0))
    for layer in lora_layers(model).values():
        rows = weight_a(layer).detach()[4:]
        bound = math.sqrt(6 / ((1 + 5) * layer.in_features))  # a = sqrt 5
        assert float(rows.abs().max()) <= bound
        assert float(rows.abs().max()) > 0.99 * bound
        assert float(rows.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_new_rows_are_those_of_peft():
    model = tiny.adapted(tiny.llama())
    resize(model, 200)
    new = weight_a(lora_layers(model)[FIRST]).detach()[4:]
    peft = weight_a(lora_layers(tiny.adapted(tiny.llama(), r=196))[FIRST]).detach()
    assert float(new.std()) == pytest.approx(float(peft.std()), rel=0.05)
    assert float(new.abs().max()) == pytest.approx(float(peft.abs().max()), rel=0.05)


def new_rows(seed):
    model = tiny.adapted(tiny.llama())
    resize(model, 6, generator=torch.Generator().manual_seed(seed))
    return torch.cat([weight_a(layer)[4:].flatten() for layer in lora_layers(model).values()])


def test_new_rows_depend_on_the_generator_alone():
    before = torch.get_rng_state()
    first = new_rows(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, new_rows(seed=3))
    assert not torch.equal(first, new_rows(seed=4))


def test_new_rows_differ_from_each_other():
    rows = new_rows(seed=3)
    assert len(rows.unique()) > 0.99 * len(rows)


# What the layers and the configuration say.


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_frozen_and_alpha_follows_the_rank(use_rslora):
    model = tiny.adapted(tiny.llama(), r=4, lora_alpha=7, use_rslora=use_rslora)
    scaling = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    resize(model, plan_for(model))
    for name, layer in lora_layers(model).items():
        rank = layer.r["default"]
        assert layer.scaling["default"] == scaling[name]
        per_rank = math.sqrt(rank) if use_rslora else rank
        assert layer.lora_alpha["default"] == pytest.approx(scaling[name] * per_rank)


def test_alpha_stays_a_whole_number_where_it_is_one():
    model = tiny.adapted(tiny.llama(), r=4, lora_alpha=8)
    resize(model, {FIRST: 3})
    alpha = lora_layers(model)[FIRST].lora_alpha["default"]
    assert (alpha, type(alpha)) == (6, int)


def test_layers_say_their_shape():
    model = tiny.adapted(tiny.gpt2())
    resize(model, plan_for(model))
    for layer in lora_layers(model).values():
        linear_a, linear_b = layer.lora_A["default"], layer.lora_B["default"]
        rank = layer.r["default"]
        assert linear_a.out_features == linear_b.in_features == rank
        assert linear_a.weight.shape == (rank, layer.in_features)
        assert linear_b.weight.shape == (layer.out_features, rank)


def test_patterns_name_the_modules_that_differ_and_no_others():
    model = tiny.adapted(tiny.llama(num_hidden_layers=12), r=4, lora_alpha=8)
    resize(model, {"model.layers.1.self_attn.q_proj": 2, "model.layers.11.mlp.up_proj": 7})
    config = lora_config(model)
    assert config.rank_pattern == {
        r"^model\.layers\.1\.self_attn\.q_proj": 2,
        r"^model\.layers\.11\.mlp\.up_proj": 7,
    }
    assert list(config.alpha_pattern.values()) == [4, 14]


def test_patterns_go_when_ranks_come_back():
    model = tiny.adapted(tiny.llama())
    resize(model, {FIRST: 2})
    resize(model, {FIRST: 4})
    assert lora_config(model).rank_pattern == {}
    assert lora_config(model).alpha_pattern == {}


# By number and by name.


def test_to_one_rank_for_every_module():
    model = tiny.adapted(tiny.gpt2())
    done = resize(model, 6)
    assert set(ranks(lora_layers(model)).values()) == {6}
    assert set(done.added.values()) == {2}
    assert done.pruned == {}


def test_by_name_leaves_the_others_as_they_are():
    model = tiny.adapted(tiny.llama())
    resize(model, {FIRST: 1})
    after = ranks(lora_layers(model))
    assert after.pop(FIRST) == 1
    assert set(after.values()) == {4}


def test_shrinking_keeps_the_ranks_that_weigh_most():
    model = tiny.adapted(tiny.llama())
    layer = lora_layers(model)[FIRST]
    with torch.no_grad():
        weight_a(layer).copy_(torch.tensor([1.0, 5.0, 1.0, 2.0])[:, None].expand(4, 32))
        weight_b(layer).copy_(torch.tensor([4.0, 1.0, 1.0, 1.0]).expand(32, 4))
    done = resize(model, {FIRST: 2})  # |A||B| goes as 4, 5, 1, 2
    assert done.kept[FIRST] == (0, 1)
    assert done.pruned == {FIRST: (2, 3)}


def test_to_the_ranks_it_has_changes_nothing():
    model = tiny.adapted(tiny.llama())
    before = {name: parameter for name, parameter in model.named_parameters()}
    resize(model, 4)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_an_injected_adapter_is_resized_too():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.llama()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), model)
    resize(model, {FIRST: 2})
    assert lora_config(model).rank_pattern == {r"^model\.layers\.0\.self_attn\.q_proj": 2}


def test_another_adapter_is_not_touched():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    config = type(lora_config(model))(r=3, target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", config)
    tiny.with_trained_b(model)
    batch = tiny.batch_for(model)
    model.set_adapter("second")
    before = logits(model, batch)
    resize(model, {FIRST: 0, "model.layers.1.self_attn.v_proj": 9})
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=0)
    assert lora_config(model, "second").rank_pattern == {}
    assert set(ranks(lora_layers(model, "second"), "second").values()) == {3}


# An emptied module.


def test_an_emptied_module_is_the_plain_layer_again():
    model = tiny.adapted(tiny.llama())
    plain = tiny.llama().get_submodule(FIRST)
    resize(model, {FIRST: 0})
    layer = model.get_base_model().get_submodule(FIRST)
    assert type(layer) is type(plain)
    assert torch.equal(layer.weight, plain.weight)
    assert FIRST not in lora_layers(model)
    assert lora_config(model).exclude_modules == [FIRST]


# Refusals: in words, and nothing is changed.


def assert_refused(model, to, error, words, **options):
    before = {name: parameter for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=words):
        resize(model, to, **options)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_an_unknown_module_is_refused():
    words = r"'q_proj' is not an adapted module; names look like 'model\.layers\.0\.self_attn"
    assert_refused(tiny.adapted(tiny.llama()), {FIRST: 2, "q_proj": 2}, ValueError, words)


def test_a_negative_rank_is_refused():
    words = r"rank of model\.layers\.0\.self_attn\.q_proj is -1; it must be a whole number from 0"
    assert_refused(tiny.adapted(tiny.llama()), {FIRST: -1}, ValueError, words)


def test_an_adapter_without_any_rank_is_refused():
    words = "Every module would be left with rank 0; keep at least one rank"
    assert_refused(tiny.adapted(tiny.llama()), 0, ValueError, words)


def test_a_plan_that_empties_all_it_names_is_carried_out_where_other_modules_have_ranks():
    model = tiny.adapted(tiny.llama())
    resize(model, Plan(kept={FIRST: ()}, added={FIRST: 0}, pruned={FIRST: (0, 1, 2, 3)}))
    assert FIRST not in lora_layers(model)


def test_a_model_without_an_adapter_is_refused():
    assert_refused(tiny.llama(), 2, TypeError, "no LoRA adapter")


# Training goes on.


@pytest.mark.parametrize("build", tiny.MODELS)
def test_every_rank_trains_afterwards(build):
    model = tiny.adapted(build())
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 2, optimizer)
    resize(model, plan_for(model), optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tiny.train(model, batch, 2, optimizer)
    for name, layer in lora_layers(model).items():
        b = weight_b(layer)
        moved = (b != before[f"base_model.model.{name}.lora_B.default.weight"]).any(dim=0)
        assert moved.all(), name


def test_training_goes_on_under_gradient_checkpointing():
    model = tiny.checkpointing(tiny.adapted(tiny.llama())).train()
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 2, optimizer)
    resize(model, plan_for(model), optimizer=optimizer)
    with torch.no_grad():
        before = float(model(**batch).loss)
    tiny.train(model, batch, 10, optimizer)
    with torch.no_grad():
        assert float(model(**batch).loss) < before
