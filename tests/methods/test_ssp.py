"""SSP: its search, what is left of it, and the paper's counts."""

import copy
import itertools

import pytest
import tiny
import torch
from peft import TaskType
from session import BUILDS, Drive, logits, prepared
from test_parameter_counts import gpt2_large, llama_2_7b, roberta_large

from loralloc.methods.ssp.gates import within_budget
from loralloc.methods.ssp.method import Ssp


def made(shape="llama", budget=3000, **options):
    with tiny.seeded(3):
        return prepared(Ssp(**options), BUILDS[shape](), budget=budget)


def gates(method):
    return torch.stack([unit.sampled for unit in method._units.values()])


@pytest.mark.parametrize("budget", [100, 928, 2999, 20_000])
@pytest.mark.parametrize("shape", BUILDS)
def test_it_ends_at_its_budget_within_one_unit(shape, budget):
    method = made(shape, budget)
    sizes = {candidate.name: candidate.size for candidate in method._candidates}
    Drive(method, num_steps=8).begin().train()
    kept = method.structure()["units"]
    dropped = [size for name, size in sizes.items() if name not in kept]
    assert method.num_stored() == sum(sizes[name] for name in kept) <= budget
    assert budget - method.num_stored() < min(dropped)


def test_the_search_keeps_what_lowers_the_loss_on_the_other_half():
    method = made()
    names = list(method._units)
    wanted, unwanted = names[::2], names[1::2]
    drive = Drive(method, num_steps=80)
    seen = []

    def loss(batch):
        seen.append(batch)
        units = method._units
        return sum(units[n].sampled for n in unwanted) - sum(units[n].sampled for n in wanted)

    drive.session.loss, other = loss, drive.session.second_half
    drive.begin().train(until=20)
    assert len(seen) == 20
    assert all(batch is next(other) for batch in seen)
    # What is wanted has 2,992 parameters: of the rest no unit fits the 8 that are left.
    assert method.num_stored() == 2992
    assert method.structure()["units"] == wanted


def test_a_step_that_accumulates_batches_has_as_many_of_the_other_half():
    found = []
    for factors in ([3.0], [-1.0, 7.0]):  # of one mean
        method = made()
        drive = Drive(method, num_steps=40).begin()
        drive.session.batches_per_step = len(factors)
        drive.session.second_half = itertools.cycle(factors)
        drive.session.loss = lambda factor, method=method: factor * gates(method)[0]
        drive.train(until=1)
        found.append(method._alphas.detach().clone())
    assert torch.allclose(*found)


def test_one_step_of_the_architecture_weights_is_adamws_on_the_clipped_gradient():
    method = made()
    drive = Drive(method, num_steps=40).begin()
    names, drawn = list(method._units), gates(method).double()
    factors = torch.arange(len(names), dtype=torch.float64) * 10

    def loss(batch):
        return gates(method) @ factors.float()

    drive.session.loss = loss
    half = method._probabilities().detach()
    drive.train(until=1)
    # z' = z (1 - z) / (p (1 - p)); every p is p0, so dp_i / dalpha_j = p0 (1 - p0) (1_ij - 1/N).
    slope = factors * drawn * (1 - drawn)
    gradient = slope - slope.mean()
    assert torch.allclose(half, half[0].expand(len(half)))
    assert gradient.norm() > 2
    clipped = 2 * gradient / gradient.norm()
    # Adam's first step is the sign of the gradient.
    expected = -0.1 * clipped / (clipped.abs() + 1e-8)
    torch.testing.assert_close(method._alphas.detach(), expected, rtol=1e-4, atol=1e-6)
    moments = method._alpha_optimizer.state[method._alphas]
    torch.testing.assert_close(moments["exp_avg"], 0.1 * clipped, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_of_the_architecture_weights_falls_to_zero():
    method = made()
    drive, rates = Drive(method, num_steps=16).begin(), []
    for number in range(1, 5):
        drive.train(until=number)
        rates.append(method._alpha_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_gates_are_drawn_once_a_step_and_are_the_same_in_both_passes():
    method = made()
    drive, seen = Drive(method, num_steps=40), []
    plain = drive.session.loss

    def loss(batch):
        seen.append(gates(method))
        return plain(batch)

    drive.session.loss = loss
    drive.begin()
    before = []
    for number in range(1, 4):
        before.append(gates(method))
        drive.train(until=number)
    assert [g.requires_grad for g in before] == [False] * 3
    for weights, architecture in zip(before, seen, strict=True):
        torch.testing.assert_close(weights, architecture)
    assert not torch.allclose(before[0], before[1], atol=0.05)


def test_seeds_draw_otherwise():
    first, second = made(), made()
    for method, seed in ((first, 0), (second, 1)):
        drive = Drive(method)
        drive.session.seed = seed
        drive.begin()
    assert not torch.allclose(gates(first), gates(second), atol=0.05)


def test_an_evaluation_is_by_the_probabilities_and_changes_nothing():
    losses = []
    for evaluates in (False, True):
        method = made()
        drive = Drive(method, num_steps=16).begin()
        drive.train(until=2)
        if evaluates:
            found = logits(method, drive.batch)
            for unit, p in zip(method._units.values(), method._probabilities(), strict=True):
                unit.sampled = p.detach().float()
            with torch.no_grad():
                again = method.model.train()(**drive.batch).logits
            mask = drive.batch["attention_mask"].bool()
            torch.testing.assert_close(found, again[mask])
            method._set_gates(3)
        with tiny.seeded(7):
            losses.append(drive.train())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("shape", BUILDS)
def test_what_is_kept_begins_anew(shape):
    method, base = made(shape), BUILDS[shape]()
    drive = Drive(method, num_steps=16).begin()
    drive.train(until=3)
    assert drive.optimizer.state
    before = {name: unit for name, unit in method._units.items()}
    drawn = {name: p.clone() for name, p in method.adapter_parameters().items()}
    drive.train(until=4)
    modules = dict(method.model.named_modules())
    kept = method.structure()["units"]
    assert 0 < len(kept) < len(before)
    assert all(modules.get(name) is (before[name] if name in kept else None) for name in before)
    assert not drive.optimizer.state
    (group,) = drive.optimizer.param_groups
    expected = [p for p in method.model.parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    for name, parameter in method.adapter_parameters().items():
        assert not torch.equal(parameter, drawn[name])
        assert name.endswith((".a", ".down")) == bool(parameter.any())
    if shape != "roberta":  # its head goes on
        batch = tiny.batch_for(base)
        with torch.no_grad():
            plain = base(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(logits(method, batch), plain)


def test_only_then_is_a_checkpoint_eligible():
    method = made()
    drive = Drive(method, num_steps=40).begin()
    assert method.search_steps(40) == method.first_eligible_step() == 10
    assert drive.num_steps == drive.session.num_steps == 50  # what is found trains for all 40
    drive.train(until=9)
    assert method.structure() == {}
    with pytest.raises(RuntimeError, match="9 of the 10 steps"):
        method.finish()
    drive.train(until=10)
    assert method.num_stored() <= 3000
    method.finish()


def test_it_searches_with_activations_computed_again():
    plain, again = made(), made()
    again.model.config.use_cache = False
    # The second is the name before Transformers 5.22.
    getattr(
        again.model, "activation_checkpointing_enable", again.model.gradient_checkpointing_enable
    )({"use_reentrant": False})
    batch, found = tiny.batch_for(plain.model), []
    for method in (plain, again):
        with tiny.seeded(7):
            found.append(Drive(method, num_steps=12).begin().train())
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert plain.structure() == again.structure()
    torch.testing.assert_close(logits(plain, batch), logits(again, batch), atol=1e-4, rtol=1e-3)


def test_a_copy_of_the_model_has_units_of_its_own():
    method = made()
    Drive(method, num_steps=8).begin().train()
    other = copy.deepcopy(method.model)
    batch = tiny.batch_for(other)
    with torch.no_grad():
        expected = method.model.eval()(**batch).logits
        for parameter in method.adapter_parameters().values():
            parameter.zero_()
        assert not torch.allclose(method.model(**batch).logits, expected)
        torch.testing.assert_close(other.eval()(**batch).logits, expected)


def test_a_bfloat16_backbone_has_float32_units():
    with tiny.seeded(3):
        method = prepared(Ssp(), tiny.llama().bfloat16())
    Drive(method, num_steps=12).begin().train()
    assert {p.dtype for p in method.adapter_parameters().values()} == {torch.float32}
    assert method.model(**tiny.batch_for(method.model)).logits.dtype == torch.bfloat16


def test_a_rank_keeps_as_much_as_lora_of_that_rank():
    model = tiny.llama()
    method = Ssp(rank=2)
    method.fit(model, budget=9999)
    assert method.max_parameters == method.count(model, 2) == 2 * 928
    assert Ssp(**method.options()) == method


@pytest.mark.parametrize(
    ("options", "budget", "words"),
    [
        (dict(search_share=1.5), 3000, "`search_share` is 1.5; it must be above 0 and at most 1"),
        (dict(rank=0), 3000, "`rank` is 0; it must be above 0"),
        (dict(), 10, "smallest unit that ssp can keep has 16 already; raise `--budget`"),
    ],
)
def test_what_cannot_be_searched_is_refused(options, budget, words):
    with pytest.raises(ValueError, match=words):
        Ssp(**options).fit(tiny.llama(), budget)


@pytest.mark.parametrize(
    ("build", "task_type", "initial", "budget"),
    [
        (llama_2_7b, TaskType.CAUSAL_LM, 39_964_672, 19_988_480),
        (roberta_large, TaskType.SEQ_CLS, 7_054_336, 3_538_944),
        (gpt2_large, TaskType.CAUSAL_LM, 11_751_680, 5_898_240),
    ],
)
def test_the_papers_settings_give_its_counts(build, task_type, initial, budget):
    with torch.device("meta"):
        model, method = build(), Ssp(**Ssp.paper)
        method.fit(model, budget=1)
        method.prepare(model, task_type=task_type)
    assert method.num_trained() == initial
    assert method.count(model, 8) == budget
    sizes = [candidate.size for candidate in method._candidates]
    p = torch.rand(len(sizes), generator=torch.Generator().manual_seed(0))
    kept = [method._candidates[index].name for index in within_budget(p, sizes, budget)]
    method.restructure({"units": kept})
    assert method.num_stored() <= budget
    assert budget - method.num_stored() < max(sizes)
    assert method.structure() == {"units": kept}
