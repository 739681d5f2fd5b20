"""What SoRA and SaLoRA share: gates outside the model, a budget in parameters, then plain LoRA."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from reference import gated as slow
from session import BUILDS, Drive, logits, prepared, task_type
from test_parameter_counts import gpt2_large, llama_2_7b, roberta_large

from loralloc.allocation.layers import lora_layers, rank_cost, ranks
from loralloc.kernels import lora as kernel
from loralloc.methods.gated import GatedLora, keep_highest
from loralloc.methods.salora import SaLora
from loralloc.methods.sora import Sora

KINDS = [Sora, SaLora]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.about.name)
def kind(request) -> type[GatedLora]:
    return request.param


def made(kind: type[GatedLora], shape: str = "llama", **options) -> GatedLora:
    # Without a proximal step SoRA prunes when SaLoRA does.
    xi = {"xi": 0.0} if kind is Sora else {}
    return prepared(kind(**{"rank": 3, **xi, **options}), BUILDS[shape]())


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 5)), min_size=1),
    st.integers(0, 60),
)
def test_the_lowest_are_dropped_until_the_others_fit(ranks, budget):
    importance, costs = zip(*ranks, strict=True)
    found = keep_highest(torch.tensor(importance).float(), torch.tensor(costs), budget)
    assert found.tolist() == slow.keep_highest(list(importance), list(costs), budget)


@pytest.mark.parametrize("shape", BUILDS)
def test_it_begins_with_twice_its_budget_and_ends_with_it_to_one_rank(kind, shape):
    method = made(kind, shape)
    budget = method.count(BUILDS[shape](), 3)
    assert method.num_trained() == 2 * budget
    dearest = max(rank_cost(layer) for layer in lora_layers(method.model).values())
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=5)
    assert method.num_stored() == 2 * budget
    drive.train(until=6)
    assert budget - dearest < method.num_stored() <= budget
    drive.train()
    method.finish()
    assert budget - dearest < method.num_stored() <= budget


def test_an_optimiser_under_which_ranks_cannot_be_dropped_is_refused_before_the_first_step(kind):
    method = made(kind)
    drive = Drive(method, num_steps=10)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    drive.session.optimizer = torch.optim.Adafactor(trained)
    with pytest.raises(TypeError, match="Adafactor keeps `row_var` of every parameter"):
        method.begin(drive.session)


def test_it_ends_where_it_pruned_and_from_there_it_is_plain_lora(kind, monkeypatch):
    method = made(kind)
    kernel.fuse(method.model)
    fused = []
    monkeypatch.setattr(
        kernel,
        "_lora_linears",
        lambda *args, own=kernel._lora_linears: fused.append(1) or own(*args),
    )
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=5)
    assert len(fused) >= 5 * 2  # the gates go into B
    assert method.extra_loss() is not None
    drive.train()
    assert len(fused) >= 9 * 2
    assert method.extra_loss() is None
    assert method.budget_step == method.first_eligible_step() == 6
    assert not any(
        layer.lora_A["default"]._forward_hooks for layer in lora_layers(method.model).values()
    )


def test_the_fused_step_of_gated_layers_is_pefts(kind):
    gradients = []
    for fuses in (False, True):
        method = made(kind)
        tiny.with_trained_b(method.model)
        Drive(method, num_steps=10).begin()
        if fuses:
            kernel.fuse(method.model)
        batch = tiny.causal_batch()
        with tiny.seeded(4):
            method.watch(batch)
        with torch.no_grad():
            method.gates.copy_(torch.linspace(-1, 3, len(method.gates)))
        method.model(**batch).loss.backward()
        trained = [p.grad for p in method.model.parameters() if p.requires_grad]
        gradients.append([*trained, method.gates.grad])
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-4)


def test_the_optimiser_follows(kind):
    method = made(kind)
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=6)
    expected = [p for p in method.model.parameters() if p.requires_grad]
    found = [p for group in drive.optimizer.param_groups for p in group["params"]]
    assert list(map(id, found)) == list(map(id, expected))
    assert set(map(id, drive.optimizer.state)) <= set(map(id, expected))
    for parameter in expected:
        assert drive.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    before = [parameter.clone() for parameter in expected]
    drive.train(until=7)
    assert all(not torch.equal(a, b) for a, b in zip(before, expected, strict=True))


def test_pruning_changes_nothing_but_the_ranks_that_go(kind):
    method = made(kind)
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=5)
    batch = tiny.causal_batch(seed=9)
    method.model.eval()
    with torch.no_grad():
        kept = keep_highest(method.importance(), method.costs, method.budget)
        closed = -1e9 if kind is SaLora else 0.0
        method.gates[~kept] = closed
    expected = logits(method, batch)
    method._prune(5)
    torch.testing.assert_close(logits(method, batch), expected, atol=1e-5, rtol=1e-5)
    assert sum(ranks(lora_layers(method.model)).values()) == int(kept.sum())


@pytest.mark.parametrize("until", [4, 10], ids=["gated", "plain"])
def test_stock_peft_opens_what_is_saved(kind, until, tmp_path):
    method = made(kind)
    Drive(method, num_steps=10).begin().train(until=until)
    method.gates.data.normal_()
    method.save(tmp_path)
    opened = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    batch = tiny.causal_batch(seed=9)
    with torch.no_grad():
        found = opened(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(found, logits(method, batch), atol=1e-5, rtol=1e-5)
    assert type(opened.peft_config["default"]).__name__ == "LoraConfig"


def test_saving_leaves_the_run_as_it_was(kind, tmp_path):
    losses = []
    for folder in (None, tmp_path):
        with tiny.seeded(4):
            drive = Drive(made(kind), num_steps=6).begin()
            drive.train(until=3)
            if folder:
                drive.method.save(folder)
            losses.append(drive.train())
    assert losses[0] == losses[1]


def test_the_gates_are_no_part_of_the_model(kind):
    method = made(kind)
    plain = {name for name in method.model.state_dict() if "lora_" not in name}
    assert all("gate." not in name and "gates" not in name for name in method.model.state_dict())
    assert len(method.gates) == 6 * 14
    assert len(method.model.state_dict()) == len(plain) + 2 * 14
    assert method.gates.dtype == torch.float32


def test_a_run_that_ends_before_its_budget_does_not_end_in_silence(kind):
    method = made(kind)
    Drive(method, num_steps=10).begin().train(until=5)
    with pytest.raises(RuntimeError, match="reaches its budget at step 6 at the latest"):
        method.finish()


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_budget_that_would_never_be_reached_is_refused(kind, share):
    with pytest.raises(ValueError, match=f"`prune_by` is {share}"):
        kind(prune_by=share)


def test_a_run_of_one_step_reaches_its_budget(kind):
    method = made(kind)
    Drive(method, num_steps=4, lr=1e-2)
    drive = Drive(method, num_steps=4)
    drive.session.num_steps = drive.num_steps = 1
    drive.begin().train()
    method.finish()
    assert method.num_stored() <= method.budget


@pytest.mark.parametrize("shape", BUILDS)
def test_it_trains_in_bf16_with_dropout(kind, shape):
    method = prepared(kind(rank=3, dropout=0.1), BUILDS[shape]().bfloat16())
    losses = Drive(method, num_steps=16).begin().train()
    assert losses[-1] < losses[0] - 0.1
    lora = [p for name, p in method.model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in lora} == {torch.float32}


def test_recomputed_activations_have_the_same_gates(kind):
    gradients = []
    for remember in (True, False):
        with tiny.seeded(5):
            method = made(kind)
            if not remember:
                tiny.checkpointing(method.model)
            tiny.with_trained_b(method.model)
            drive = Drive(method, num_steps=10).begin()
            (drive.loss_of(drive.batch) + method.extra_loss()).backward()
            lora = {n: p.grad for n, p in method.model.named_parameters() if p.requires_grad}
            gradients.append([*lora.values(), method.gates.grad])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_micro_batches_add_up(kind):
    gradients = []
    for num_pieces in (1, 2):
        with tiny.seeded(6):
            method = made(kind)
            tiny.with_trained_b(method.model)
            Drive(method, num_steps=10).begin()
            batch = tiny.causal_batch(num_examples=2)
            for _ in range(num_pieces):
                method.watch(batch)
                loss = method.model(**batch).loss + method.extra_loss()
                (loss / num_pieces).backward()
            gradients.append(method.gates.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("build", "at_the_end"),
    [(llama_2_7b, 19_988_480), (roberta_large, 3_538_944), (gpt2_large, 5_898_240)],
)
def test_the_papers_counts(kind, build, at_the_end):
    with torch.device("meta"):
        model = build()
        method = kind(**kind.paper)
        assert method.count(model, method.rank) == at_the_end
        method.prepare(model, task_type=task_type(model))
    assert method.num_trained() == 2 * at_the_end
    assert method.budget == at_the_end
