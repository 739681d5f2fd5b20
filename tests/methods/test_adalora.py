"""AdaLoRA by PEFT: its schedule, its scores and its regulariser, without a call of the user's."""

import json

import pytest
import tiny
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from reference import adalora as slow
from safetensors.torch import load_file
from session import BUILDS, Drive, logits, prepared, task_type
from test_parameter_counts import gpt2_large, llama_2_7b, roberta_large

from loralloc.kernels.lora import fuse
from loralloc.methods.adalora import AdaLora
from loralloc.methods.session import Session

NUM_MODULES = 14
"""Linear layers of the tiny Llama's two blocks."""


def made(shape: str = "llama", **options) -> AdaLora:
    return prepared(AdaLora(**{"rank": 3, **options}), BUILDS[shape]())


def layers(method: AdaLora) -> list[AdaLoraLayer]:
    return [module for module in method.model.modules() if isinstance(module, AdaLoraLayer)]


def num_active(method: AdaLora) -> int:
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers(method))


def active_after_each_step(drive: Drive) -> list[int]:
    counts = []
    while drive.done < drive.num_steps:
        drive.train(until=drive.done + 1)
        counts.append(num_active(drive.method))
    return counts


@pytest.fixture(scope="module")
def run() -> tuple[AdaLora, list[int]]:
    """A method at the end of 40 steps, with the number of active triplets after each."""
    method = made()
    counts = active_after_each_step(Drive(method, num_steps=40).begin())
    method.finish()
    return method, counts


def test_the_budget_falls_by_a_cube(run):
    _, counts = run
    # 84 triplets until step 4, 42 from step 22 on; between them 42 + 42 (1 - (t - 4) / 18)^3.
    assert counts[:4] == [84] * 4
    assert counts[4] == 77  # 42 + 42 * (17 / 18)^3 = 77.4
    assert counts[12] == 47  # 42 + 42 / 8 = 47.25
    assert counts[21:] == [42] * 19
    options = dict(first=84, last=42, num_steps=40, tinit=4, tfinal=18)
    assert counts == [slow.budget(step, **options) for step in range(1, 41)]


@pytest.mark.parametrize("shape", ["llama", "roberta"])
def test_the_last_allocation_fits_the_budget_in_parameters(shape):
    found = {}
    for fits in (True, False):
        method = made(shape, rank=8, fits_parameters=fits)
        method.sized_for = 8 * sum(x.in_features + x.out_features for x in layers(method))
        Drive(method).begin().train()
        found[fits] = num_active(method), method.over_budget()
    # One triplet is 1.2% of the Llama's budget.
    assert abs(found[True][1]) < 0.01
    assert found[False][0] == 8 * len(layers(method))
    assert abs(found[False][1]) > abs(found[True][1])
    assert found[True][0] != found[False][0]


def test_a_long_run_allocates_three_hundred_times():
    method = made()
    session = Session(
        optimizer=tiny.optimizer_for(method.model), num_steps=3000, steps_per_epoch=300, loss=len
    )
    method.begin(session)
    config = method.model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.deltaT) == (300, 1350, 10)
    assert method.first_eligible_step() == 1650


def test_the_most_important_triplets_stay():
    method = made()
    drive = Drive(method).begin()
    elements = [
        [slow.Triplet(layer.in_features, layer.out_features) for _ in range(6)]
        for layer in layers(method)
    ]
    step, compared = method.step, 0

    def observed(number: int) -> None:
        nonlocal compared
        for triplets, layer in zip(elements, layers(method), strict=True):
            _update(triplets, layer)
        step(number)
        if number > 4:
            scores = [triplet.score for triplets in elements for triplet in triplets]
            now = torch.cat([layer.lora_E["default"] for layer in layers(method)]).flatten() != 0
            options = dict(first=84, last=42, num_steps=40, tinit=4, tfinal=18)
            assert now.tolist() == slow.kept(scores, slow.budget(number, **options))
            compared += 1

    method.step = observed
    drive.train(until=20)
    assert compared == 16


def _update(triplets: list[slow.Triplet], layer: AdaLoraLayer) -> None:
    """Before PEFT does: values as they are after the optimiser's step, with their gradients."""
    (e, q, p) = (store["default"] for store in (layer.lora_E, layer.lora_A, layer.lora_B))
    pairs = [(e, e.grad), (q, q.grad), (p.T, p.grad.T)]
    (e, de), (q, dq), (p, dp) = ((x.tolist(), dx.tolist()) for x, dx in pairs)
    for i, triplet in enumerate(triplets):
        triplet.value.update(e[i][0], de[i][0])
        for smoothed, values, gradients in ((triplet.right, q, dq), (triplet.left, p, dp)):
            for element, value, gradient in zip(smoothed, values[i], gradients[i], strict=True):
                element.update(value, gradient)


@pytest.mark.parametrize("shape", ["llama", "roberta"])
def test_it_is_peft_driven_by_hand(shape):
    method = made(shape, scale=2.0)
    drive = Drive(method).begin()
    model = BUILDS[shape]()
    with tiny.seeded(3):
        config = AdaLoraConfig(
            init_r=6, target_r=3, lora_alpha=12, tinit=4, tfinal=18, total_step=40, deltaT=1,
            orth_reg_weight=0.1, task_type=task_type(model),
            target_modules=tiny.LLAMA_TARGETS if shape == "llama" else tiny.BERT_TARGETS,
        )  # fmt: skip
        peer = get_peft_model(model, config).train()
    optimizer = tiny.optimizer_for(peer)
    for number in range(1, 41):
        peer(**drive.batch).loss.backward()  # with PEFT's own regulariser
        optimizer.step()
        peer.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    drive.train()
    expected = dict(peer.named_parameters())
    for name, parameter in method.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "scale"), [({}, 8.0), ({"scale": 2.0}, 2.0)])
def test_the_scale_is_its_authors_where_none_is_given(options, scale):
    method = made(**options)
    layer = layers(method)[0]
    with torch.no_grad(), tiny.seeded(5):
        for store in (layer.lora_E, layer.lora_A, layer.lora_B):
            store["default"].normal_()
        x = torch.randn(5, layer.in_features)
        e, q, p = (store["default"] for store in (layer.lora_E, layer.lora_A, layer.lora_B))
        update = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(
            update, scale * x @ (p @ torch.diag(e[:, 0]) @ q).T, rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_it_stores_the_triplets_that_stay_and_stock_peft_opens_them(run, tmp_path):
    method, _ = run
    method.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in saved.items() if "lora_E" in name) == 42
    assert sum(tensor.numel() for tensor in saved.values()) == method.num_stored()
    assert method.num_stored() < 0.7 * method.num_trained()
    opened = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    batch = tiny.causal_batch(seed=9)
    expected = logits(method, batch)
    del batch["labels"]  # with them PEFT 0.21.2 looks for its regulariser's weight and fails
    with torch.no_grad():
        found = opened(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", [10, 30])
def test_a_checkpoint_opens_as_the_model_that_it_was_taken_from(at, tmp_path):
    method = made()
    drive = Drive(method).begin()
    drive.train(until=at)
    # Between two allocations what was zero trains on.
    method.model.peft_config["default"].deltaT = 100
    drive.train(until=at + 2)
    method.save(tmp_path)
    other = made()
    other.load(tmp_path)
    batch = tiny.causal_batch(seed=9)
    torch.testing.assert_close(logits(other, batch), logits(method, batch), atol=1e-5, rtol=1e-5)
    other.load(tmp_path)  # as a run does that takes up its best checkpoint
    torch.testing.assert_close(logits(other, batch), logits(method, batch), atol=1e-5, rtol=1e-5)


def test_checkpoints_before_the_budget_are_not_eligible():
    method = made()
    drive = Drive(method).begin()
    assert method.first_eligible_step() == 22
    drive.train(until=21)
    assert method.num_stored() == method.num_trained()
    with pytest.raises(RuntimeError, match="until step 22, and the run ended before"):
        method.finish()
    drive.train(until=22)
    method.finish()
    assert num_active(method) == 3 * NUM_MODULES


def test_a_run_that_trained_nothing_does_not_end_in_silence():
    method = made()
    Drive(method, lr=0.0).begin().train()
    with pytest.raises(RuntimeError, match="every triplet of importance zero"):
        method.finish()


def test_the_shortest_run_reaches_its_budget_and_a_shorter_one_is_refused():
    method = made()
    Drive(method, num_steps=4).begin().train()
    method.finish()
    assert num_active(method) == 3 * NUM_MODULES
    with pytest.raises(ValueError, match="so none is left to allocate in"):
        Drive(made(), num_steps=3).begin()


def test_a_share_is_between_0_and_1():
    with pytest.raises(ValueError, match=r"`final_share` is -0\.1"):
        AdaLora(final_share=-0.1)


def test_a_run_is_not_gone_on_with_from_another_rank(tmp_path):
    made(rank=3).save(tmp_path)
    with pytest.raises(ValueError, match="`init_r` of 6, and now it is 8"):
        made(rank=4).check_saved(tmp_path)


def test_the_config_that_is_saved_names_the_schedule(run, tmp_path):
    run[0].save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ("init_r", "target_r", "tinit", "tfinal", "total_step", "lora_alpha")
    assert [config[name] for name in names] == [6, 3, 4, 18, 40, 48]


def test_it_trains_in_bf16_with_dropout():
    method = prepared(AdaLora(rank=3, dropout=0.1), tiny.llama().bfloat16())
    losses = Drive(method, num_steps=16).begin().train()
    assert losses[-1] < losses[0]
    assert {p.dtype for p in method.model.parameters() if p.requires_grad} == {torch.float32}
    assert num_active(method) == 3 * NUM_MODULES


@pytest.mark.parametrize(
    ("build", "at_the_end", "at_the_start"),
    [
        (llama_2_7b, 19_988_480, 39_976_960 + 3_584),
        (roberta_large, 3_538_944, 7_077_888 + 2_304),
        (gpt2_large, 5_898_240, 11_796_480 + 2_304),
    ],
)
def test_the_papers_counts(build, at_the_end, at_the_start):
    with torch.device("meta"):
        model = build()
        method = AdaLora(**AdaLora.paper)
        assert method.count(model, method.rank) == at_the_end
        method.prepare(model, task_type=task_type(model))
    assert method.num_trained() == at_the_start


def test_the_fused_step_allocates_alike():
    kept = []
    for fuses in (False, True):
        method = made()
        if fuses:
            assert fuse(method.model) == 14
        Drive(method).begin().train()
        kept.append([layer.lora_E["default"].ne(0).flatten() for layer in layers(method)])
    assert torch.equal(torch.cat(kept[0]), torch.cat(kept[1]))
