"""Rank allocation in a loop of one's own."""

import pytest
import tiny
import torch
from torch.nn import functional as F
from trainers import options, present, ranks_now

from loralloc import follow, resize
from loralloc.allocation import replicas
from loralloc.allocation.record import Record
from loralloc.methods.restore import saved_ranks

STEPS = dict(num_steps=12, steps_per_epoch=6)


def made(model=None):
    model = (model or tiny.adapted(tiny.llama(), r=2)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2)


def held_out():
    return [tiny.causal_batch(4, seed=1)]


def trained(model, optimizer, steps):
    for number in steps:
        model(**tiny.causal_batch(4, seed=number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rounds_follow_the_optimisers_steps_and_new_ranks_train(tmp_path):
    model, optimizer = made()
    told = []
    following = follow(
        optimizer, model, options(ranks_per_round=4), held_out(), on_round=told.append, **STEPS
    )
    start = ranks_now(model)
    trained(model, optimizer, range(12))
    record = following.record
    assert [entry.step for entry in record.rounds] == following.steps == [3, 6, 9]
    assert [entry.epoch for entry in record.rounds] == [0.5, 1.0, 1.5]
    assert told == record.rounds
    assert ranks_now(model) == present(record.ranks) != start
    assert sum(record.ranks.values()) == sum(start.values())
    followed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert followed == {id(p) for p in model.parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    assert saved_ranks(tmp_path) == ranks_now(model)
    assert Record.load(tmp_path).rounds == record.rounds


@pytest.mark.parametrize(("score", "power"), [("gradient", 0), ("gradient", 1), ("sensitivity", 0)])
def test_a_loop_goes_on_from_the_states_of_its_checkpoint(score, power):
    ends = []
    for kept in (None, 7):
        model, optimizer = made()
        batches = held_out() if score == "gradient" else ()
        config = options(ranks_per_round=5, score=score, rank_lr_power=power)
        following = follow(optimizer, model, config, batches, **STEPS)
        trained(model, optimizer, range(kept or 12))
        if kept:
            states = [x.state_dict() for x in (following, model, optimizer)]
            model, optimizer = made()
            following = follow(optimizer, model, config, batches, **STEPS)
            for part, state in zip((following, model, optimizer), states, strict=True):
                part.load_state_dict(state)
            trained(model, optimizer, range(kept, 12))
        ends.append((following.record.ranks, model.state_dict()))
    assert ends[0][0] == ends[1][0]
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=0, atol=1e-6)


def test_shapes_can_be_given_before_there_is_an_optimiser():
    model, optimizer = made()
    following = follow(optimizer, model, options(ranks_per_round=5), held_out(), **STEPS)
    trained(model, optimizer, range(7))
    state, weights = following.state_dict(), model.state_dict()
    other = tiny.adapted(tiny.llama(), r=2)
    resize(other, state["ranks"])
    other.load_state_dict(weights)
    _, again = made(other)
    resumed = follow(again, other, options(ranks_per_round=5), held_out(), **STEPS)
    resumed.load_state_dict(state)
    assert resumed.record == following.record
    assert ranks_now(other) == ranks_now(model)


def test_other_options_than_it_was_begun_with_are_refused():
    model, optimizer = made()
    state = follow(optimizer, model, options(), held_out(), **STEPS).state_dict()
    model, optimizer = made()
    following = follow(optimizer, model, options(num_rounds=2), held_out(), **STEPS)
    with pytest.raises(ValueError, match="was begun with `num_rounds` of 3, and now it is 2"):
        following.load_state_dict(state)


def test_saving_before_any_round_is_refused_until_it_is_detached(tmp_path):
    model, optimizer = made()
    following = follow(optimizer, model, options(), held_out(), **STEPS)
    trained(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match="plain LoRA; train until the round after step 3 first"):
        model.save_pretrained(tmp_path)
    following.detach()
    trained(model, optimizer, range(2, 5))
    model.save_pretrained(tmp_path)
    assert not following.record.rounds and not (tmp_path / "allocation.json").exists()


def test_a_part_of_a_module_with_a_loss_of_its_own():
    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny.adapted(tiny.bert_classifier(), r=2)

        def forward(self, batch):
            logits = self.encoder(batch["input_ids"]).logits
            return F.mse_loss(logits[:, 0], batch["labels"].float())

    model, optimizer = made(Scored())
    config, held = options(ranks_per_round=4), [tiny.classification_batch(8, seed=1)]
    following = follow(optimizer, model, config, held, loss=model, **STEPS)
    for number in range(12):
        model(tiny.classification_batch(4, seed=number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(following.record.rounds) == 3
    assert following.record.rounds[-1].s_full < 0
    assert ranks_now(model.encoder) == present(following.record.ranks)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"score": "architecture"}, [], "whose gates learn from training examples that the loop"),
        ({}, [], "measured on held-out batches, and there are none; give some as `batches`"),
        ({"preset": "shrink"}, held_out(), '`preset` is "shrink"'),
        ({"min_rank": 3}, held_out(), "raise the LoRA rank `r` to 3"),
    ],
)
def test_what_a_loop_cannot_have_is_refused_before_the_first_step(changes, given, words):
    model, optimizer = made()
    with pytest.raises(ValueError, match=words):
        follow(optimizer, model, options(**changes), given, **STEPS)
    assert "save_pretrained" not in vars(model)


def test_one_batch_in_the_place_of_a_list_is_refused():
    model, optimizer = made()
    with pytest.raises(TypeError, match=r"`batches` is a single batch; give a list of them"):
        follow(optimizer, model, options(), held_out()[0], **STEPS)


def test_batches_without_labels_are_refused_before_the_first_step():
    model, optimizer = made(tiny.adapted(tiny.bert_classifier(), r=2))
    batch = tiny.classification_batch(4)
    del batch["labels"]
    with pytest.raises(ValueError, match="The model gives no loss for a scoring batch of input_"):
        follow(optimizer, model, options(), [batch], **STEPS)


def test_an_optimiser_of_other_weights_and_several_processes_are_refused(monkeypatch):
    model, optimizer = made()
    with pytest.raises(ValueError, match="optimiser"):
        follow(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1),
            model,
            options(),
            held_out(),
            **STEPS,
        )
    monkeypatch.setattr(replicas, "count", lambda: 2)
    with pytest.raises(TypeError, match="The loop runs in 2 processes"):
        follow(optimizer, model, options(), held_out(), **STEPS)


def test_two_adapted_parts_are_refused_by_name():
    both = torch.nn.ModuleDict({n: tiny.adapted(tiny.llama(), r=2) for n in ("query", "text")})
    optimizer = torch.optim.SGD(both.parameters(), lr=1)
    with pytest.raises(TypeError, match=r"Several parts of the model .* \(query, text\)"):
        follow(optimizer, both, options(), held_out(), **STEPS)
