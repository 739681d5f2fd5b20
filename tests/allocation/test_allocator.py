import pytest
import tiny
import torch
from crossed import crossed
from peft import LoraConfig, PeftModel, get_peft_model

from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import gradient
from loralloc.allocation.layers import lora_layers, rank_cost, ranks
from loralloc.allocation.policy import Scores
from loralloc.allocation.record import Record
from loralloc.allocation.schedule import Schedule

SCORES = ["gradient", "screened", "ablation", "shapley"]
every_score = pytest.mark.parametrize("score", SCORES)


def allocate(model, *, num_rounds, steps_between=3, seed=0, **options):
    """A short run: train, one round, train, one round..."""
    config = AllocationConfig(seed=seed, **options)
    held_out = tiny.micro_batches(tiny.batch_for(model, seed=5), 3)
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 3, optimizer)
    allocator = Allocator(model, config, held_out)
    for number in range(num_rounds):
        allocator.step(optimizer, step=3 + number, epoch=0.5 * number)
        tiny.train(model, batch, steps_between, optimizer)
    return allocator


# A round.


@pytest.mark.parametrize(("build", "score"), crossed(tiny.MODELS, SCORES))
def test_the_total_of_ranks_stays_in_every_round(build, score):
    model = tiny.adapted(build())
    record = allocate(model, num_rounds=3, score=score).record
    total = sum(record.initial_ranks.values())
    assert [sum(entry.ranks_after.values()) for entry in record.rounds] == [total] * 3
    assert record.ranks != record.initial_ranks


def test_the_record_says_what_the_model_is():
    model = tiny.adapted(tiny.llama())
    record = allocate(model, num_rounds=4).record
    assert {name: rank for name, rank in record.ranks.items() if rank} == ranks(lora_layers(model))
    for before, after in zip(record.rounds, record.rounds[1:], strict=False):
        assert after.ranks_before is before.ranks_after  # a long run holds it once
    for entry in record.rounds:
        for name, rank in entry.ranks_before.items():
            change = entry.added.get(name, 0) - len(entry.pruned.get(name, []))
            assert entry.ranks_after[name] == rank + change
            assert (
                len(entry.terms["without"].get(name, []))
                == len(entry.terms["only"].get(name, []))
                == rank
            )
    assert [(e.round, e.step, e.epoch) for e in record.rounds] == [
        (1, 3, 0.0),
        (2, 4, 0.5),
        (3, 5, 1.0),
        (4, 6, 1.5),
    ]


def test_the_ranks_pruned_are_those_of_lowest_importance():
    entry = allocate(tiny.adapted(tiny.llama()), num_rounds=1, score="ablation").record.rounds[0]
    importance = {
        (name, index): without + only
        for name in entry.terms["without"]
        for index, (without, only) in enumerate(
            zip(entry.terms["without"][name], entry.terms["only"][name], strict=True)
        )
    }
    lowest = sorted(importance, key=importance.__getitem__)[:7]
    assert {(n, i) for n, indices in entry.pruned.items() for i in indices} == set(lowest)


def test_the_function_changes_only_by_what_is_pruned():
    model = tiny.adapted(tiny.llama())
    batch = tiny.batch_for(model)
    tiny.train(model, batch, 3)
    allocator = Allocator(model, AllocationConfig(ranks_per_round=3), [batch])
    s_full = allocator.step(tiny.optimizer_for(model)).s_full
    again = allocator.step(tiny.optimizer_for(model), step=1)
    # New ranks do nothing, so S(M) moves by about the sum of S(M) - S(M without r) of three ranks.
    gone = allocator.record.rounds[0]
    lost = sum(
        gone.terms["without"][name][i] for name, indices in gone.pruned.items() for i in indices
    )
    assert again.s_full == pytest.approx(s_full - lost, abs=0.1 * abs(s_full - again.s_full) + 1e-4)


def test_a_model_with_an_adapter_outside_its_blocks():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "up_proj", "lm_head"])
    allocator = allocate(model, num_rounds=3)
    assert allocator.num_pruned == 2
    assert sum(allocator.record.ranks.values()) == 5 * 4


def test_a_round_works_under_gradient_checkpointing():
    model = tiny.checkpointing(tiny.adapted(tiny.llama())).train()
    checkpointed = allocate(model, num_rounds=2).record
    plain = allocate(tiny.adapted(tiny.llama()).train(), num_rounds=2).record
    assert checkpointed.ranks == plain.ranks


def test_a_round_works_under_a_bfloat16_backbone():
    record = allocate(tiny.adapted(tiny.llama().bfloat16()), num_rounds=2).record
    assert sum(record.ranks.values()) == sum(record.initial_ranks.values())


# How many are pruned.


@pytest.mark.parametrize(
    ("build", "ranks_per_round", "expected"),
    [
        (tiny.llama, "block", 7),
        (tiny.llama, "model", 14),
        (tiny.llama, 5, 5),
        (tiny.gpt2, "block", 4),
        (tiny.bert_classifier, "block", 6),
        (tiny.t5, "model", 12),
    ],
)
def test_ranks_a_round_by_block_by_model_or_by_number(build, ranks_per_round, expected):
    model = tiny.adapted(build())
    config = AllocationConfig(ranks_per_round=ranks_per_round, score="gradient")
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    assert allocator.num_pruned == expected
    entry = allocator.step(None)
    assert sum(map(len, entry.pruned.values())) == expected


def test_by_block_is_counted_on_the_model_as_it_was_at_first():
    model = tiny.adapted(tiny.llama(), r=1)
    allocator = allocate(model, num_rounds=3)  # half of the modules leave in each round
    assert {sum(map(len, entry.pruned.values())) for entry in allocator.record.rounds} == {7}
    assert (
        Allocator(
            model, AllocationConfig(), [tiny.batch_for(model)], record=allocator.record
        ).num_pruned
        == 7
    )


# Limits.


def test_min_rank_and_max_rank_hold_in_every_round():
    model = tiny.adapted(tiny.llama(), r=4)
    record = allocate(model, num_rounds=6, min_rank=3, max_rank=6).record
    for entry in record.rounds:
        assert min(entry.ranks_after.values()) >= 3
        assert max(entry.ranks_after.values()) <= 6
        assert sum(entry.ranks_after.values()) + entry.spare + entry.lost == 14 * 4


def young_that_went(record):
    """For each round but the first: how many ranks given in the round before it pruned."""
    counts = []
    for before, entry in zip(record.rounds, record.rounds[1:], strict=False):
        # New ranks come last.
        first_young = {n: before.ranks_after[n] - c for n, c in before.added.items()}
        counts.append(
            sum(i >= first_young.get(n, 10**9) for n, gone in entry.pruned.items() for i in gone)
        )
    return counts


def test_churn_is_the_share_of_new_ranks_that_go_in_the_next_round():
    record = allocate(tiny.adapted(tiny.llama()), num_rounds=5, steps_between=1).record
    assert record.rounds[0].churn is None
    assert [entry.churn for entry in record.rounds[1:]] == [n / 7 for n in young_that_went(record)]
    assert any(young_that_went(record))


def newest_are_least_important(objective, weights_b, limits):
    only = {name: -torch.arange(b.shape[1], dtype=torch.float32) for name, b in weights_b.items()}
    without = {name: torch.zeros_like(term) for name, term in only.items()}
    return Scores(terms={"without": without, "only": only}, s_full=0.0, s_base=0.0)


@pytest.mark.parametrize(
    ("grace_rounds", "pruned", "churn"),
    [
        # One of k0's two goes, k1 receives; k1's new one goes, k0 receives; k0's new one goes.
        (0, [("k0", 1), ("k1", 2), ("k0", 1)], [None, 1.0, 1.0]),
        # k1's new one is left in peace, so that an old one goes; a round later its turn comes.
        (1, [("k0", 1), ("k1", 1), ("k1", 1)], [None, 0.0, 0.0]),
    ],
)
def test_grace_protects_new_ranks_for_so_many_rounds(grace_rounds, pruned, churn, monkeypatch):
    monkeypatch.setattr(gradient, "score", newest_are_least_important)
    model = tiny.adapted(tiny.llama(num_hidden_layers=3), r=2, target_modules=["k_proj"])
    config = AllocationConfig(ranks_per_round=1, score="gradient", grace_rounds=grace_rounds)
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    entries = [allocator.step(None) for _ in pruned]
    short = {f"model.layers.{block}.self_attn.k_proj": f"k{block}" for block in range(3)}
    assert [
        [(short[name], *indices) for name, indices in entry.pruned.items()] for entry in entries
    ] == [[rank] for rank in pruned]
    assert [entry.churn for entry in entries] == churn


def test_a_budget_in_parameters_is_never_exceeded():
    model = tiny.adapted(tiny.llama())
    cost = {name: rank_cost(layer) for name, layer in lora_layers(model).items()}
    record = allocate(model, num_rounds=5, budget="parameters").record
    budget = sum(cost.values()) * 4
    for entry in record.rounds:
        spent = sum(cost[name] * rank for name, rank in entry.ranks_after.items())
        assert spent + entry.spare == budget
        assert 0 <= entry.spare < max(cost.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == budget - record.spare


def test_a_budget_without_a_receiver_is_lost_and_recorded():
    model = tiny.adapted(tiny.llama(), r=4, target_modules=["q_proj"])
    tiny.with_trained_b(model)
    config = AllocationConfig(ranks_per_round=7, min_rank=0, score="gradient")
    entry = Allocator(model, config, [tiny.batch_for(model)]).step(None)
    assert entry.lost == 7
    assert sum(entry.ranks_after.values()) == 1


# An adapter of another name.


def under_the_name(name, build=tiny.llama):
    """A model whose one adapter has this name."""
    options = dict(r=4, lora_alpha=8, target_modules=tiny.LLAMA_TARGETS, task_type="CAUSAL_LM")
    with tiny.seeded(1):
        return get_peft_model(build(), LoraConfig(**options), adapter_name=name).eval()


@pytest.mark.parametrize(
    "score",
    [
        *("gradient", "shapley", "architecture", "sensitivity"),
        pytest.param("screened", marks=pytest.mark.slow),
        pytest.param("ablation", marks=pytest.mark.slow),
    ],
)
def test_an_adapters_name_makes_no_difference(score, tmp_path):
    records = []
    for name in ("default", "sql"):
        model = tiny.with_trained_b(under_the_name(name))
        batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
        tracked = score in ("architecture", "sensitivity")
        config = AllocationConfig(score=score, num_rounds=2)
        allocator = Allocator(model, config, [] if tracked else [batch])
        assert allocator.adapter_name == name
        allocator.check_optimizer(optimizer)
        for _ in range(2):
            allocator.learn([batch])
            model(**batch).loss.backward()
            optimizer.step()
            allocator.observe()
            optimizer.zero_grad()
            allocator.step(optimizer)
        records.append(without_seconds(allocator.record.as_data()))
        now = {n: rank for n, rank in allocator.record.ranks.items() if rank}
        assert ranks(lora_layers(model, name), name) == now
        model.save_pretrained(tmp_path / name)
        folder = tmp_path / name / ("" if name == "default" else name)
        opened = PeftModel.from_pretrained(tiny.llama(), folder).eval()
        assert ranks(lora_layers(opened)) == now
        with torch.no_grad():
            torch.testing.assert_close(opened(**batch).loss, model(**batch).loss)
    assert records[0] == records[1]


def test_of_several_adapters_the_named_one_moves_alone():
    model = tiny.adapted(tiny.llama(), r=4)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    tiny.with_trained_b(model)
    config = AllocationConfig(ranks_per_round=2)
    allocator = Allocator(model, config, [tiny.batch_for(model)], adapter_name="second")
    entry = allocator.step(None)
    assert entry.ranks_after != entry.ranks_before
    assert set(ranks(lora_layers(model)).values()) == {4}
    assert len(allocator.record.births()) == 4


# Twice, and in two parts.


def run_of(seed, num_rounds=3, **options):
    with tiny.seeded(99 + seed):  # nothing may depend on the global generator
        model = tiny.adapted(tiny.llama())
        allocator = allocate(model, num_rounds=num_rounds, seed=seed, **options)
    return allocator.record.as_data(), model.state_dict()


def without_seconds(data):
    return {**data, "rounds": [{**entry, "seconds": None} for entry in data["rounds"]]}


@every_score
def test_the_same_seed_gives_the_same_ranks_scores_and_weights(score):
    (first, weights), (second, weights_again) = (
        run_of(1, num_rounds=2, score=score) for _ in range(2)
    )
    assert without_seconds(first) == without_seconds(second)
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_another_seed_gives_other_new_ranks():
    (first, _), (second, _) = run_of(1), run_of(2)
    assert first["rounds"][0]["pruned"] == second["rounds"][0]["pruned"]
    assert first["rounds"][2]["terms"]["only"] != second["rounds"][2]["terms"]["only"]


def test_two_rounds_of_one_run_draw_different_new_ranks():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), target_modules=["q_proj", "k_proj"]))
    allocator = Allocator(model, AllocationConfig(ranks_per_round=2), [tiny.batch_for(model)])
    drawn = set()
    for _ in range(3):
        entry = allocator.step(None)
        for name, count in entry.added.items():
            rows = lora_layers(model)[name].lora_A["default"].weight[-count:]
            drawn |= {tuple(row.tolist()) for row in rows}
    assert len(drawn) == 3 * 2


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path):
    whole = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    batch, config = tiny.batch_for(whole), AllocationConfig(seed=4)
    allocator = Allocator(whole, config, [batch])
    for _ in range(4):
        allocator.step(None)

    cut = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    first = Allocator(cut, config, [batch])
    for _ in range(2):
        first.step(None)
    first.record.save(tmp_path)
    second = Allocator(cut, config, [batch], record=Record.load(tmp_path))
    for _ in range(2):
        second.step(None)

    assert without_seconds(second.record.as_data()) == without_seconds(allocator.record.as_data())
    weights, weights_again = whole.state_dict(), cut.state_dict()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_the_record_of_a_run_comes_back_from_its_file(tmp_path):
    record = allocate(tiny.adapted(tiny.gpt2()), num_rounds=3).record
    record.save(tmp_path)
    assert Record.load(tmp_path) == record


# A loss that is no number.


def bits(model, optimizer):
    tensors = list(model.state_dict().values())
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize(("score", "bad"), crossed(SCORES, [float("nan"), float("inf")]))
def test_a_loss_that_is_not_finite_refuses_the_round_and_changes_nothing(score, bad):
    model = tiny.adapted(tiny.llama())
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 2, optimizer)
    allocator = Allocator(model, AllocationConfig(score=score), [batch])
    parameters, before = list(model.parameters()), bits(model, optimizer)
    overflow = model.get_base_model().lm_head.register_forward_hook(
        lambda _module, _args, output: output * bad
    )
    with pytest.raises(ScoringError, match="Round 1 at step 12 was refused and the model left as"):
        allocator.step(optimizer, step=12)
    overflow.remove()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits(model, optimizer), before, strict=True))
    assert allocator.record.rounds == []
    assert model.peft_config["default"].rank_pattern == {}
    assert allocator.step(optimizer, step=13).round == 1


def test_the_refusal_names_both_losses_and_what_to_do():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    with torch.no_grad():
        lora_layers(model)["model.layers.1.mlp.up_proj"].lora_A["default"].weight.fill_(1e38)
    allocator = Allocator(model, AllocationConfig(score="gradient"), [tiny.batch_for(model)])
    with pytest.raises(ScoringError) as error:
        allocator.step(None)
    assert "nan with the adapter and " in str(error.value)
    assert str(error.value).endswith("lower the learning rate or check the data.")


# Its number of rounds.


def test_the_schedule_tells_the_number_of_rounds_and_is_recorded(tmp_path):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    schedule = Schedule(steps=(3, 8), note="why there are two")
    config = AllocationConfig(score="sensitivity", num_rounds=8)
    allocator = Allocator(model, config, schedule=schedule)
    assert (allocator.record.round_steps, allocator.record.note) == ([3, 8], schedule.note)
    optimizer, batch = tiny.optimizer_for(model), tiny.batch_for(model)
    for _ in range(2):
        assert allocator.is_gathering
        model(**batch).loss.backward()
        allocator.observe()
        optimizer.zero_grad()
        allocator.step(optimizer)
    assert not allocator.is_gathering
    with pytest.raises(RuntimeError, match="The 2 rounds of the allocation are over, and 'sensi"):
        allocator.step(optimizer)
    allocator.record.save(tmp_path)
    assert Record.load(tmp_path) == allocator.record


# What is refused at the start.


def refused(model, error, words, record=None, **options):
    with pytest.raises(error, match=words):
        Allocator(model, AllocationConfig(**options), [tiny.batch_for(model)], record=record)


def test_a_budget_smaller_than_min_rank_allows():
    words = (
        r"The budget is 56 ranks and model\.layers\.0\.self_attn\.q_proj has 4, but `min_rank` of "
        r"5 on 14 modules needs 70; raise the LoRA rank `r` to 5 or more, or lower `min_rank`\."
    )
    refused(tiny.adapted(tiny.llama()), ValueError, words, min_rank=5)


def test_pruning_everything_at_once():
    words = r"`ranks_per_round` of 56 prunes 56 ranks a round, but the adapter has only 56; lower"
    refused(tiny.adapted(tiny.llama()), ValueError, words, ranks_per_round=56)
    words = r"`ranks_per_round` of 'model' prunes 14 ranks a round, but the adapter has only 14"
    refused(tiny.adapted(tiny.llama(), r=1), ValueError, words, ranks_per_round="model")


def test_by_block_without_one_list_of_blocks():
    words = 'do not lie in one list of transformer blocks.*`ranks_per_round="block"`'
    refused(tiny.adapted(tiny.t5()), ValueError, words)


def test_a_bias_that_would_be_lost_with_a_module():
    words = (
        r"The adapter has `bias='lora_only'`, with which PEFT saves the bias of "
        r"transformer\.h\.0\.attn\.c_attn beside its ranks only, so that it would be lost with the "
        r"last of them; set `min_rank=1`, or train with `bias='none'`\."
    )
    refused(tiny.adapted(tiny.gpt2(), bias="lora_only"), ValueError, words)
    model = tiny.adapted(tiny.gpt2(), bias="lora_only")
    Allocator(model, AllocationConfig(min_rank=1), [tiny.batch_for(model)])
    without_biases = tiny.adapted(tiny.llama(), bias="lora_only")
    Allocator(without_biases, AllocationConfig(), [tiny.batch_for(without_biases)])


def test_an_optimiser_that_cannot_follow():
    model = tiny.adapted(tiny.llama())
    allocator = Allocator(model, AllocationConfig(), [tiny.batch_for(model)])
    allocator.check_optimizer(tiny.optimizer_for(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(TypeError, match="Adafactor keeps `row_var` of every parameter"):
        allocator.check_optimizer(torch.optim.Adafactor(trained))


def test_dora():
    refused(tiny.adapted(tiny.llama(), use_dora=True), TypeError, "uses `use_dora`")


def test_an_embedding():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "embed_tokens"])
    refused(model, TypeError, "embed_tokens is a Embedding")


def test_a_model_without_an_adapter():
    refused(tiny.llama(), TypeError, "has no LoRA adapter named 'default'")


def test_no_supervised_position():
    batch = tiny.causal_batch()
    batch["labels"].fill_(tiny.IGNORED)
    with pytest.raises(ValueError, match="no supervised position"):
        Allocator(tiny.adapted(tiny.llama()), AllocationConfig(), [batch])


def test_a_record_of_other_ranks():
    record = allocate(tiny.adapted(tiny.llama()), num_rounds=1).record
    words = "ranks are not those of the record it is to continue; restore the adapter"
    refused(tiny.adapted(tiny.llama()), ValueError, words, record=record)


def test_a_record_of_another_model():
    record = Record(config={}, initial_ranks={"another": 4})
    refused(tiny.adapted(tiny.llama()), ValueError, "ranks are not those", record=record)
