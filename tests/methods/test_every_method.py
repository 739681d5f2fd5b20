"""What holds for every method on every shape of backbone; a method's own tests are in its file."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import given
import pytest
import session
import tiny
import torch
from peft import TaskType
from safetensors.torch import load_file
from session import BUILDS, Drive, logits, prepared

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.catalog import METHODS, get_method
from loralloc.methods.method import Method

VARIANTS = (
    *("shrink", "random", "inverse", "mlp-only", "attention-only", "prune", "truncate", "pattern"),
    *("eva", "gora", "elalora", "l1ra", "increlora", "igu-lora", "dora", "rslora", "lora-plus"),
    "pissa",
)
"""Methods on PEFT's own LoRA layers, whose shapes ALoRA and LoRA are tried on in every run of the
tests; on the others than Llama's these are in `make reliability`."""


def cases(shapes, without=(), *, alike=False):
    """Every method on every shape; some of them `slow`, which `make reliability` runs.

    Args:
        shapes: Of backbones.
        without: Methods that are left out.
        alike: Whether what is checked does not depend on the shape, nor differ between variants.
    """
    return [
        pytest.param(
            *(name, shape),
            marks=[pytest.mark.slow]
            if (name in VARIANTS and (alike or shape != "llama")) or (alike and shape != "llama")
            else [],
            id=f"{name}-{shape}",
        )
        for name in METHODS
        for shape in shapes
        if name not in without
    ]


CASES = cases(BUILDS)
ALIKE = cases(BUILDS, alike=True)
DECODERS = cases([shape for shape in BUILDS if shape != "roberta"], alike=True)

ALLOCATION = AllocationConfig(num_rounds=4, warmup_epochs=0.8, budget="parameters")
"""Of methods that have rounds: after steps 8, 10, 12 and 15 of 40."""

SHRINKING = AllocationConfig(rounds_at=(8, 10, 12, 15), tolerance=0.05)
"""Of the one that prunes only; the last size is judged after step 18."""

LEARNING_RATES = {"p-tuning-v2": 0.1, "lora-plus": 2e-3}
"""Of methods that need another than the rest to learn in a few steps: a prefix must grow first, and
LoRA+ takes sixteen times the rate for B."""


def made(name: str, shape: str, **options):
    model = BUILDS[shape]()
    options = {**given.options(name), **options}
    kind = get_method(name)
    if session.task_type(model) not in kind.about.task_types:
        pytest.skip(f"{name} is not for {session.task_type(model)}")
    if kind.allocates:
        options["allocation"] = SHRINKING if name == "shrink" else ALLOCATION
    return prepared(kind(**options), model)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_at_step_0_it_equals_the_backbone_or_says_why_not(name, shape):
    method, base = made(name, shape), BUILDS[shape]()
    Drive(method).begin()
    batch = tiny.batch_for(base)
    with torch.no_grad():
        plain = base(**batch).logits
    plain = plain[batch["attention_mask"].bool()] if plain.ndim == 3 else plain
    is_same = torch.allclose(logits(method, batch), plain, atol=1e-5)
    assert is_same == method.about.starts_as_base
    assert bool(method.about.why_not_base) != method.about.starts_as_base


@dataclass(frozen=True)
class Trained:
    """A method that has been trained and has ended."""

    name: str
    shape: str
    method: Method
    losses: list[float]
    base: Mapping[str, torch.Tensor]
    """The backbone's weights before it was adapted."""


def trained_once(name: str, shape: str) -> Trained:
    """A training of a method on a shape."""
    base = BUILDS[shape]().state_dict()
    method = made(name, shape)
    losses = Drive(method, lr=LEARNING_RATES.get(name, 1e-2)).begin().train()
    method.finish()
    return Trained(name, shape, method, losses, base)


@pytest.fixture(scope="module")
def trained(request):
    """One training for all tests of a method on a shape, which leave it as it is."""
    return trained_once(*request.param)


def trainings(found):
    """Cases of `cases`, for the fixture `trained`."""
    return pytest.mark.parametrize(
        "trained",
        [pytest.param(case.values, marks=case.marks, id=case.id) for case in found],
        indirect=True,
    )


@trainings(CASES)
def test_it_learns_and_leaves_the_backbone_as_it_was(trained):
    method, losses, base = trained.method, trained.losses, trained.base
    assert losses[-1] < 0.8 * losses[0]
    if not method.about.keeps_backbone:
        return
    inner = session._inner(method.model)
    frozen = {n: p for n, p in inner.named_parameters() if not p.requires_grad}
    compared = 0
    for name_now, parameter in frozen.items():
        original = name_now.replace(".base_layer", "").replace(".original_module", "")
        if original in base:
            compared += 1
            assert torch.equal(parameter, base[original]), name_now
    assert compared > 10 or trained.name == "full"


@trainings(CASES)
def test_saved_and_opened_it_computes_the_same(trained, tmp_path):
    method = trained.method
    method.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    assert load_file(tmp_path / "adapter_model.safetensors")
    other = made(trained.name, trained.shape, **method.options())
    other.load(tmp_path)
    batch = tiny.batch_for(BUILDS[trained.shape](), seed=9)
    torch.testing.assert_close(logits(other, batch), logits(method, batch), atol=1e-5, rtol=1e-5)


@trainings(CASES)
def test_merged_it_computes_the_same_or_says_that_it_cannot_merge(trained):
    method = copy.deepcopy(trained.method)
    batch = tiny.batch_for(BUILDS[trained.shape](), seed=9)
    expected = logits(method, batch)
    if not method.about.merges:
        with pytest.raises(TypeError, match="cannot be merged"):
            method.merge()
        return
    merged = method.merge().eval()
    assert type(merged) is type(BUILDS[trained.shape]())
    with torch.no_grad():
        found = merged(**batch).logits
    found = found[batch["attention_mask"].bool()] if found.ndim == 3 else found
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(trained.method, batch), expected)


@pytest.mark.parametrize(
    "at",
    [pytest.param(6, marks=pytest.mark.slow), 15, pytest.param(33, marks=pytest.mark.slow)],
    ids="step {}".format,
)
@pytest.mark.parametrize(("name", "shape"), ALIKE)
def test_resumed_it_trains_as_if_it_had_not_stopped(name, shape, at, tmp_path):
    with tiny.seeded(11):
        whole = Drive(made(name, shape)).begin()
        whole.train(until=at)
        whole.method.save(tmp_path)
        state, moments = copy.deepcopy((whole.method.state(), whole.optimizer.state_dict()))
        generator = torch.get_rng_state()
        expected = whole.train()
        resumed = made(name, shape)
        drive = Drive(resumed)
        resumed.check_saved(tmp_path)
        resumed.load(tmp_path)
        resumed.load_state(state)
        drive.done = at
        torch.set_rng_state(generator)
        found = drive.begin(moments=moments).train()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "shape"), ALIKE)
def test_the_same_seed_trains_the_same(name, shape):
    losses = []
    for _ in range(2):
        with tiny.seeded(12):
            losses.append(Drive(made(name, shape), num_steps=16).begin().train())
    assert losses[0] == losses[1]


# Budgets in triplets or in ranks, and a size that is found.
@trainings(cases(BUILDS, without=("adalora", "eva", "shrink")))
def test_it_has_the_parameters_that_it_was_sized_for(trained):
    method = trained.method
    counted = method.count(BUILDS[trained.shape](), method.chosen_size())
    assert method.num_stored() <= counted * 1.01
    assert method.num_stored() >= counted * 0.9


@pytest.mark.parametrize("num_beams", [1, 5])
@trainings(DECODERS)
def test_cached_generation_equals_uncached(trained, num_beams):
    model = trained.method.model.eval()
    prompts = torch.tensor([[0, 0, 7, 9, 11], [5, 8, 21, 30, 4]])
    options = dict(
        inputs=prompts, attention_mask=(prompts != tiny.PADDING).long(), max_new_tokens=8,
        do_sample=False, num_beams=num_beams, pad_token_id=tiny.PADDING,
    )  # fmt: skip
    if session.task_type(session._inner(model)) == TaskType.CAUSAL_LM:
        cached = model.generate(**options, use_cache=True)
        assert torch.equal(cached, model.generate(**options, use_cache=False))
        alone = model.generate(
            **{**options, "inputs": prompts[:1, 2:], "attention_mask": torch.ones(1, 3).long()},
            use_cache=True,
        )
        assert cached[0, 5:].tolist()[: len(alone[0]) - 3] == alone[0, 3:].tolist()
