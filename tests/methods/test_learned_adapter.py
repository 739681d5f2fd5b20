"""Learned-Adapter: the formula, the search, and convolutions that see what they may see."""

import copy

import backbones
import pytest
import rounding
import session
import tiny
import torch
from reference import learned_adapter as reference
from session import BUILDS, Drive, prepared
from transformers import (
    DynamicCache,
)

from loralloc.allocation.blocks import sublayers
from loralloc.allocation.objective import Objective
from loralloc.methods.learned_adapter.cell import ACTIVATIONS, OPERATIONS, Cell
from loralloc.methods.learned_adapter.method import LearnedAdapter, round_steps
from loralloc.methods.learned_adapter.search import best, by_ablation, by_gradient
from loralloc.methods.learned_adapter.sequence import Sequences

EVERYTHING = {"activations": list(ACTIVATIONS), "operations": list(OPERATIONS)}
CONVOLUTION = {"activations": ["silu"], "operations": ["convolution"]}


def made(shape: str, kept=None, **options) -> LearnedAdapter:
    """Prepared, evaluating, with weights as if it had trained, and the same choice everywhere."""
    model = BUILDS[shape]()
    method = prepared(LearnedAdapter(bottleneck=6, **options), model)
    with tiny.seeded(7), torch.no_grad():
        for cell in method.cells().values():
            cell.up.normal_(std=0.3)
    if kept:
        method.restructure(dict.fromkeys(method.cells(), kept))
    method.model.eval()
    return method


def weights_of(cell: Cell) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in cell.named_parameters()}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "kept",
    [EVERYTHING, CONVOLUTION]
    + [{"activations": [name], "operations": ["identity"]} for name in ACTIVATIONS]
    + [{"activations": ["relu", "tanh"], "operations": ["mix", "convolution"]}],
)
def test_an_adapter_computes_the_formula(kept, is_causal):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with tiny.seeded(1):
        sequences = Sequences(is_causal=is_causal)
        cell = Cell(8, 5, sequences)
        cell.up.data.normal_()
        y = torch.randn(2, 6, 8)
    weights = weights_of(cell)
    cell.keep(**kept)
    sequences.begin(mask, None, None)
    expected = reference.adapter(y, mask, weights, kept, is_causal=is_causal)
    is_token = mask.bool()
    torch.testing.assert_close(cell(y)[is_token], expected[is_token])


@pytest.mark.parametrize("shape", BUILDS)
def test_scores_are_those_of_whole_forward_passes(shape):
    method = made(shape)
    batch = tiny.batch_for(method.model, num_examples=3)
    cells = method.cells()
    base = BUILDS[shape]().eval()
    if shape == "roberta":
        base.classifier.load_state_dict(method.model.classifier.state_dict())
    places = {name: sublayer.writes for name, sublayer in zip(cells, sublayers(base), strict=True)}
    expected = reference.scores(
        base,
        places,
        batch,
        {name: weights_of(cell) for name, cell in cells.items()},
        dict.fromkeys(cells, EVERYTHING),
        is_causal=shape != "roberta",
    )
    method.model.train()
    found = by_ablation(Objective(method.model, tiny.micro_batches(batch, 2)), cells)
    assert found.keys() == expected.keys()
    losses = [score for choices in expected.values() for score in choices["operations"].values()]
    atol = rounding.of_losses(method.model, *losses)
    for name in expected:
        for choice in EVERYTHING:
            assert list(found[name][choice]) == EVERYTHING[choice]
            assert found[name][choice] == pytest.approx(expected[name][choice], abs=atol)
    assert method.structure() == dict.fromkeys(cells, EVERYTHING)
    assert method.model.training
    assert all(parameter.grad is None for parameter in method.model.parameters())


@pytest.mark.parametrize("shape", BUILDS)
def test_where_adapters_do_little_the_gradient_gives_the_same_scores(shape):
    method = made(shape)
    cells = method.cells()
    for cell in cells.values():
        cell.up.data *= 0.05
    objective = Objective(method.model, tiny.micro_batches(tiny.batch_for(method.model), 4))
    exact, found = by_ablation(objective, cells), by_gradient(objective, cells)
    rounded = rounding.of_losses(method.model, objective.mean_loss())
    for name in cells:
        for choice in EVERYTHING:
            # S(M) is in every score; what the candidates differ by is compared.
            middle = sum(exact[name][choice].values()) / len(exact[name][choice])
            expected = torch.tensor([value - middle for value in exact[name][choice].values()])
            first_order = torch.tensor([value - middle for value in found[name][choice].values()])
            atol = 0.05 * float(expected.abs().max()) + rounded
            torch.testing.assert_close(first_order, expected, rtol=0, atol=atol)
            assert not cells[name].leanings
    assert all(parameter.grad is None for parameter in method.model.parameters())


def test_the_best_has_the_highest_score_and_of_equals_comes_first():
    assert best({"operations": {"identity": -2.0, "mix": 0.5, "convolution": 0.5}}) == {
        "operations": "mix"
    }


@pytest.mark.parametrize(
    ("search_steps", "num_rounds", "expected"),
    [
        (70, 4, [40, 50, 60, 70]),  # K2 is a quarter of K1
        (10, 4, [6, 7, 9, 10]),
        (4, 4, [1, 2, 3, 4]),
        (50, 1, [50]),
    ],
)
def test_rounds_come_after_k1_and_k2_and_the_last_ends_the_search(
    search_steps, num_rounds, expected
):
    assert round_steps(search_steps, num_rounds) == expected


def test_a_run_too_short_for_its_rounds_is_refused():
    with pytest.raises(ValueError, match="The search has 3 steps for its 4 rounds; train for more"):
        Drive(made("llama"), num_steps=12).begin()


@pytest.mark.parametrize(
    "options", [{"search_share": 1.5}, {"search_share": 0}, {"num_rounds": 0}, {"score": "x"}]
)
def test_options_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
        LearnedAdapter(**options)


@pytest.mark.parametrize("score", ["gradient", "ablation"])
def test_each_round_chooses_for_a_quarter_and_the_last_for_the_rest(score):
    drive = Drive(prepared(LearnedAdapter(score=score), tiny.llama(num_hidden_layers=4))).begin()
    chosen = []
    for step in (5, 6, 7, 9, 10):  # the rounds are at 6, 7, 9 and 10 of 40
        drive.train(until=step)
        chosen.append(sum(cell.is_chosen for cell in drive.method.cells().values()))
    assert chosen == [0, 2, 4, 6, 8]
    assert drive.method.first_eligible_step() == drive.method.search_steps(40) == 10


def test_which_adapters_are_first_is_drawn_by_the_seed():
    def first_round(seed):
        drive = Drive(prepared(LearnedAdapter(), tiny.llama(num_hidden_layers=4)))
        drive.session.seed = seed
        return next(iter(drive.begin().method._rounds.values()))

    assert first_round(1) == first_round(1)
    assert len({tuple(first_round(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("retrain", [True, False])
def test_what_is_not_kept_leaves_the_model_and_the_optimiser(retrain):
    drive = Drive(prepared(LearnedAdapter(retrain=retrain), tiny.llama())).begin()
    drive.train(until=5)
    before = set(drive.method.adapter_parameters().values())
    drive.train(until=10)
    now = list(drive.method.adapter_parameters().values())
    assert len(now) < len(before)
    assert [id(p) for group in drive.optimizer.param_groups for p in group["params"]] == [
        id(parameter) for parameter in now
    ]
    assert set(drive.optimizer.state) == (set() if retrain else set(now))
    drive.train(until=12)
    assert set(drive.optimizer.state) == set(now)


def test_after_the_search_weights_are_drawn_anew_or_train_on():
    for retrain in (True, False):
        drive = Drive(prepared(LearnedAdapter(retrain=retrain), tiny.llama())).begin()
        drive.train(until=9)
        cell = next(iter(drive.method.cells().values()))
        down = cell.down.detach().clone()
        losses = drive.train(until=11)
        assert torch.allclose(cell.down, down, atol=0.1) is not retrain
        with torch.no_grad():
            at_base = tiny.llama()(**drive.batch).loss.item()
        assert (losses[-1] == pytest.approx(at_base)) is retrain


def test_a_run_that_ended_within_the_search_is_refused():
    drive = Drive(prepared(LearnedAdapter(), tiny.llama())).begin()
    drive.train(until=9)
    with pytest.raises(RuntimeError, match=r"ended while 1 adapters .* more steps than the 10"):
        drive.method.finish()


@pytest.mark.parametrize(
    ("name", "bottleneck", "at_start", "with_mix", "with_nothing"),
    [
        # The paper prints 21.2M at both ends, which two b x b matrices an adapter would give
        # (21,176,320); a depthwise convolution has 3 b weights in the place of the second.
        ("llama-2-7b", 40, 21_081_600, 21_073_920, 20_971_520),
        # The paper prints 3.66M at first (again two matrices) and 3.54M at last.
        ("roberta-large", 36, 3_606_336, 3_601_152, 3_538_944),
        ("gpt2-large", 36, 6_736_608, 6_728_832, 6_635_520),
    ],
)
def test_counts_on_the_papers_backbones(name, bottleneck, at_start, with_mix, with_nothing):
    model = backbones.build(name)
    method = prepared(LearnedAdapter(bottleneck=bottleneck), model)
    assert method.count(model, bottleneck) == with_mix
    assert method.num_trained() == at_start
    for operation, expected in (("mix", with_mix), ("identity", with_nothing)):
        kept = {"activations": ["relu"], "operations": [operation]}
        copied = copy.deepcopy(method)
        copied.restructure(dict.fromkeys(method.cells(), kept))
        assert copied.num_stored() == expected


def test_the_papers_setting_begins_its_rounds_after_one_epoch_of_ten():
    method = LearnedAdapter(**LearnedAdapter.paper)
    assert method.bottleneck == 40
    assert round_steps(method.search_steps(1000), method.num_rounds) == [100, 125, 150, 175]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_in_a_decoder_no_token_sees_a_later_one(shape):
    model = made(shape, CONVOLUTION).model
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 6:] = 5
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


def test_in_an_encoder_a_token_sees_both_neighbours():
    cell = next(iter(made("roberta", CONVOLUTION).cells().values()))
    y = torch.zeros(1, 5, 32)
    y[0, 2] = 1
    moved = cell(y).abs().sum(-1)[0] > 1e-6
    assert moved.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("shape", "side"),
    [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("roberta", "right")],
)
def test_padding_changes_nothing(shape, side):
    model = made(shape, CONVOLUTION).model
    ids = torch.randint(3, tiny.VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
    padding = torch.full((1, 3), tiny.PADDING)
    parts = [padding, ids] if side == "left" else [ids, padding]
    padded = torch.cat(parts, dim=1)
    mask = torch.cat([torch.full_like(p, int(p is ids)) for p in parts], dim=1)
    given = dict(input_ids=padded, attention_mask=mask)
    if shape != "roberta":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone, found = model(ids, attention_mask=torch.ones_like(ids)).logits, model(**given).logits
    torch.testing.assert_close(found if shape == "roberta" else found[mask.bool()][None], alone)


def test_sequences_in_one_row_do_not_see_each_other():
    with tiny.seeded(1):
        sequences = Sequences(is_causal=True)
        hidden, kernel = torch.randn(1, 7, 5), torch.randn(3, 5)
    sequences.begin(None, torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), None)
    packed = sequences.convolve(hidden, kernel)
    sequences.begin(None, None, None)
    alone = [sequences.convolve(part, kernel) for part in (hidden[:, :3], hidden[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [None, DynamicCache])
def test_a_prompt_read_in_pieces_with_its_cache_is_as_if_read_at_once(shape, cache):
    model = made(shape, CONVOLUTION).model
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = tiny.PADDING
    mask = (ids != tiny.PADDING).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, found = cache and cache(), []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 9)):
            outputs = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past = outputs.past_key_values
            found.append(outputs.logits)
    is_token = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[is_token], whole[is_token])


def test_the_cache_follows_its_rows():
    """Beams reorder it, and a prompt is read once for all of its beams."""
    model = made("llama", CONVOLUTION).model
    ids = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        whole = model(torch.cat([ids[rows], ids[:, :1]], dim=1)).logits[:, -1]
        repeated_whole = model(ids.repeat_interleave(2, 0)).logits[:, -1]
        past = model(ids, use_cache=True).past_key_values
        past.reorder_cache(rows)
        found = model(ids[:, :1], past_key_values=past).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        past.batch_repeat_interleave(2)
        repeated = model(ids[:, -1:].repeat_interleave(2, 0), past_key_values=past).logits[:, -1]
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(repeated, repeated_whole)
    with pytest.raises(ValueError, match=r"shortened by 2 tokens.*without an assistant"):
        past.crop(-2)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_generation_with_convolutions_everywhere(shape, num_beams):
    model = made(shape, CONVOLUTION).model
    ids = torch.tensor([[0, 0, 7, 9, 11], [5, 8, 21, 30, 4]])
    options = dict(
        inputs=ids, attention_mask=(ids != tiny.PADDING).long(), max_new_tokens=10,
        do_sample=False, num_beams=num_beams, pad_token_id=tiny.PADDING, eos_token_id=None,
    )  # fmt: skip
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert len(set(cached[0].tolist())) > 4  # it does not repeat itself whatever it reads


def test_a_mask_that_does_not_tell_padding_is_refused():
    model = made("llama", CONVOLUTION).model
    with pytest.raises(TypeError, match=r"give a mask of shape \(batch, length\), and generate"):
        model(torch.ones(1, 4).long(), attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("shape", BUILDS)
def test_gradients_are_the_same_under_checkpointing(shape):
    gradients = []
    for is_checkpointing in (False, True):
        method = made(shape)
        model = method.model.train()
        if is_checkpointing:
            model.config.use_cache = False
            # The second is the name before Transformers 5.22.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        model(**tiny.batch_for(model)).loss.backward()
        gradients.append([p.grad for p in method.adapter_parameters().values()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_on_a_bf16_backbone_weights_and_gradients_are_float32():
    model = tiny.llama().to(torch.bfloat16)
    method = prepared(LearnedAdapter(bottleneck=6), model)
    model(**tiny.batch_for(model)).loss.backward()
    for cell in method.cells().values():
        assert cell.up.dtype == cell.up.grad.dtype == torch.float32
        assert cell.up.grad.abs().sum() > 0


def test_a_copy_of_the_model_has_adapters_of_its_own():
    method = made("llama", CONVOLUTION)
    batch = tiny.batch_for(method.model)
    other = copy.deepcopy(method.model)
    expected = session.logits(method, batch)
    with torch.no_grad():
        for name, module in other.named_modules():
            if isinstance(module, Cell):
                module.up.zero_()
                assert module.sequences is not method.cells()[name].sequences
        plain = tiny.llama()(**batch).logits
        torch.testing.assert_close(other(**batch).logits, plain)
    torch.testing.assert_close(session.logits(method, batch), expected)
