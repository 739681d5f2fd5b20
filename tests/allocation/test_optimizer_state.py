"""An optimiser under which ranks cannot move is refused before its first step."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from peft.optimizers import create_lorafa_optimizer
from torch.optim import Optimizer

from loralloc.allocation.layers import lora_layers, weight_a, weight_b, weights_ab
from loralloc.allocation.optimizer_state import check_optimizer
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def check(model, optimizer):
    check_optimizer(optimizer, weights_ab(lora_layers(model)))


class Keeping(Optimizer):
    """Keeps what it is told to keep of every parameter, and does not move it."""

    def __init__(self, params, **keeps):
        self.keeps = keeps
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param].update({k: make(param) for k, make in self.keeps.items()})


class ScheduleFree(Optimizer):
    """The state and the two modes of schedule-free optimisers: z is a copy of the weight."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "train_mode": False})

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Call train() first.")
            for param in group["params"]:
                self.state[param].setdefault("z", param.clone()).sub_(param.grad, alpha=0.1)


class Subclass(torch.Tensor):
    """As torchao's state in 8 bits is one."""


def paged(param):
    state = torch.zeros_like(param)
    state.is_paged = True
    return state


UNKNOWN = (
    "keeps {} of every parameter, and how that follows a change of rank is not known; use an "
    'optimiser such as optim="adamw_torch".'
)
REFUSED = {
    "schedule-free": (lambda m: ScheduleFree(trainable(m)), UNKNOWN.format("`z`")),
    "adafactor": (
        lambda m: transformers.Adafactor(trainable(m)),
        UNKNOWN.format("`exp_avg_sq_row`"),
    ),
    "asgd": (lambda m: torch.optim.ASGD(trainable(m)), UNKNOWN.format("`eta`")),
    "lora-fa": (
        lambda m: create_lorafa_optimizer(m, r=4, lora_alpha=8, lr=1e-3),
        "LoraFAOptimizer keeps state under 'base_model.model.model.layers.0.self_attn.q_proj.lora'",
    ),
    "an unknown number": (
        lambda m: Keeping(trainable(m), RMS=lambda p: 1.0),
        UNKNOWN.format("`RMS`"),
    ),
    "a known name with another shape": (
        lambda m: Keeping(trainable(m), state1=lambda p: torch.zeros(2, *p.shape)),
        "Keeping keeps `state1` of shape (2, 4, 32) for a parameter of shape (4, 32), which cannot",
    ),
    "a count of many numbers": (
        lambda m: Keeping(trainable(m), step=torch.zeros_like),
        "Keeping keeps `step` of shape",
    ),
    "a tensor of another kind": (
        lambda m: Keeping(
            trainable(m), exp_avg=lambda p: torch.zeros(p.shape).as_subclass(Subclass)
        ),
        "keeps `exp_avg` as Subclass, and how",
    ),
    "paged memory": (
        lambda m: Keeping(trainable(m), state1=paged),
        "keeps `state1` in memory that is paged, and how",
    ),
    "bytes of which nothing is known": (
        lambda m: Keeping(trainable(m), state1=lambda p: torch.zeros_like(p, dtype=torch.uint8)),
        "keeps `state1` as torch.uint8, and how",
    ),
}


@pytest.mark.parametrize(("make", "words"), list(REFUSED.values()), ids=list(REFUSED))
def test_before_the_first_step(make, words):
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "v_proj"])
    with pytest.raises(TypeError) as error:
        check(model, make(model))
    assert words in str(error.value)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "lora-fa"])
def test_and_after_it_as_when_a_run_is_resumed(name):
    make, _ = REFUSED[name]
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "v_proj"])
    optimizer = make(model)
    if hasattr(optimizer, "train"):
        optimizer.train()
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    for refuse in (lambda: check(model, optimizer), lambda: resize(model, 3, optimizer=optimizer)):
        with pytest.raises(TypeError, match=f"{type(optimizer).__name__} keeps `"):
            refuse()


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Rprop,
        lambda p: Keeping(p, exp_avg=lambda p: None),
    ],
)
def test_what_can_follow_is_taken(make):
    model = tiny.adapted(tiny.llama())
    check(model, make(trainable(model)))


def test_what_depends_on_the_size_is_seen_at_the_size():
    """bitsandbytes keeps small parameters in 32 bits and large ones in 8."""

    def by_size(param):
        kind = torch.uint8 if param.numel() > 150 else torch.float32
        return torch.zeros_like(param, dtype=kind)

    model = tiny.adapted(tiny.llama())  # the largest weights are of 48 by 4
    with pytest.raises(TypeError, match=r"keeps `state1` as torch\.uint8"):
        check(model, Keeping(trainable(model), state1=by_size))


def test_a_step_that_wants_more_than_gradients_is_judged_by_what_it_kept():
    class Wanting(Keeping):
        def step(self, closure):
            super().step()
            raise AssertionError("never reached without a closure")

    model = tiny.adapted(tiny.llama())
    check(model, Wanting(trainable(model), z=torch.clone))  # to be judged by `resize`

    class Failing(Keeping):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("no kernel for this device")

    with pytest.raises(TypeError, match="Failing keeps `z`"):
        check(model, Failing(trainable(model), z=torch.clone))


def test_trying_it_leaves_the_optimiser_and_everything_else_alone():
    model = tiny.adapted(tiny.llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups, random = repr(optimizer.state_dict()), torch.get_rng_state()
    check(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert repr(optimizer.state_dict()) == groups and not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    assert steps == [] and scheduler.last_epoch == 0
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    assert steps == [1]


def test_random_numbers_of_a_trial_are_not_taken_from_the_run():
    model = tiny.adapted(tiny.llama())
    random = torch.get_rng_state()
    check(model, Keeping(trainable(model), exp_avg=torch.randn_like))
    assert torch.equal(torch.get_rng_state(), random)


def test_the_optimiser_under_a_wrapper_is_looked_at():
    model = tiny.adapted(tiny.llama())
    wrapped = SimpleNamespace(optimizer=ScheduleFree(trainable(model)))
    with pytest.raises(TypeError, match="ScheduleFree keeps `z`"):
        check(model, wrapped)


def test_a_weight_that_the_optimiser_does_not_have_is_refused():
    model = tiny.adapted(tiny.llama())
    only_a = [p for name, p in model.named_parameters() if "lora_A" in name]
    with pytest.raises(ValueError, match=r"A trainable LoRA weight of model.* would never train"):
        check(model, torch.optim.AdamW(only_a))


def test_state_of_other_parameters_is_their_own_matter():
    model = tiny.adapted(tiny.llama())
    head = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([*trainable(model), head])
    optimizer.state[head]["own"] = torch.zeros(7)
    check(model, optimizer)
    optimizer = Keeping([*trainable(model), head], z=torch.clone)
    optimizer.state[head]["exp_avg"] = torch.zeros(3)
    with pytest.raises(TypeError, match="Keeping keeps `z`"):
        check(model, optimizer)


# State in 8 bits.

NAME = "model.layers.0.self_attn.q_proj"
PLAN = Plan(kept={NAME: (1, 3)}, added={NAME: 3}, pruned={NAME: (0, 2)})
QMAP = torch.cat([(torch.arange(-127, 128) / 127) ** 3, torch.ones(1)])  # zero is one of them


def dequantised(codes, absmax):
    """Line by line: a byte stands for a value, times the largest magnitude of its block."""
    values = torch.empty(codes.numel())
    for index, code in enumerate(codes.flatten().tolist()):
        values[index] = QMAP[code] * absmax[index // 256]
    return values.view(codes.shape)


def quantised(values):
    codes, absmax = torch.empty(values.numel(), dtype=torch.uint8), []
    flat = values.flatten()
    for start in range(0, len(flat), 256):
        block = flat[start : start + 256]
        absmax.append(float(block.abs().max()))
        for offset, value in enumerate(block.tolist()):
            scaled = value / absmax[-1] if absmax[-1] else 0.0
            codes[start + offset] = int((QMAP - scaled).abs().argmin())
    return codes.view(values.shape), torch.tensor(absmax)


class Momentum8Bit(Optimizer):
    """Momentum in 8 bits, kept as bitsandbytes keeps it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"], state["qmap1"] = 0, QMAP
                    state["state1"], state["absmax1"] = quantised(torch.zeros_like(param))
                momentum = dequantised(state["state1"], state["absmax1"]) * 0.9 + param.grad
                state["state1"], state["absmax1"] = quantised(momentum)
                state["step"] += 1
                param.sub_(momentum, alpha=group["lr"])


@pytest.fixture
def in_8_bits():
    """A model with rows of A of one block each, trained for two steps."""
    wide = tiny.llama(hidden_size=256, intermediate_size=8, num_hidden_layers=1)
    model = tiny.with_trained_b(tiny.adapted(wide, target_modules=["q_proj"]))
    optimizer = Momentum8Bit(trainable(model))
    check(model, optimizer)
    for seed in (0, 1):
        tiny.train(model, tiny.batch_for(model, seed=seed), 1, optimizer)
    return model, optimizer


def test_state_in_8_bits_follows_its_ranks(in_8_bits):
    model, optimizer = in_8_bits
    layer = lora_layers(model)[NAME]
    state_a, state_b = optimizer.state[weight_a(layer)], optimizer.state[weight_b(layer)]
    codes, absmax = state_a["state1"].clone(), state_a["absmax1"].clone()
    before_b = dequantised(state_b["state1"], state_b["absmax1"])
    resize(model, PLAN, optimizer=optimizer)
    state_a, state_b = optimizer.state[weight_a(layer)], optimizer.state[weight_b(layer)]
    # A row is a block of its own, so not a bit of it changes.
    assert torch.equal(state_a["state1"][:2], codes[[1, 3]])
    assert torch.equal(state_a["absmax1"][:2], absmax[[1, 3]])
    assert not dequantised(state_a["state1"], state_a["absmax1"])[2:].any()
    # Columns are put into other blocks, and rounded to them.
    after_b = dequantised(state_b["state1"], state_b["absmax1"])
    assert not after_b[:, 2:].any()
    widest = float((QMAP[1:] - QMAP[:-1]).max()) / 2 * float(before_b.abs().max())
    torch.testing.assert_close(after_b[:, :2], before_b[:, [1, 3]], rtol=0, atol=widest)
    again, absmax_again = quantised(after_b)
    torch.testing.assert_close(dequantised(again, absmax_again), after_b)
    for state, weight in ((state_a, weight_a(layer)), (state_b, weight_b(layer))):
        assert state["state1"].shape == weight.shape and state["state1"].dtype == torch.uint8
        assert state["absmax1"].shape == (math.ceil(weight.numel() / 256),)
        assert state["qmap1"] is QMAP and state["step"] == 2


def test_training_goes_on_in_8_bits(in_8_bits):
    model, optimizer = in_8_bits
    resize(model, PLAN, optimizer=optimizer)
    batch = tiny.batch_for(model)
    with torch.no_grad():
        before = float(model(**batch).loss)
    tiny.train(model, batch, 3, optimizer)
    with torch.no_grad():
        assert float(model(**batch).loss) < before
