"""Rounds of a compiled model: it stays compiled, however many there are."""

import pytest
import tiny
import torch
import trainers
from torch._dynamo.testing import CompileCounter

from loralloc import resize
from loralloc.training.way_of_running import compile_anew, is_compiled

LIMIT = 3  # of recompilations; dynamo's own is 8


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("way", [wrapped, in_place])
def test_after_many_rounds_the_model_is_still_compiled(way, tmp_path):
    model, counter, x = tiny.adapted(tiny.llama(), r=2), CompileCounter(), torch.ones(1, 32)
    trainer = trainers.causal_trainer(tmp_path, model=model)
    part = model.get_base_model().model.layers[0].mlp
    trainer.model = compiled = way(part, counter)
    assert is_compiled(trainer)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for rank in range(3, 4 + LIMIT):
            resize(model, rank)
            compile_anew(trainer)
            counts = [counter.frame_count]
            for _ in range(2):
                compiled(x).sum().backward()
                counts.append(counter.frame_count)
            assert counts[0] < counts[1] == counts[2], rank  # for each round anew, and once


def test_where_nothing_is_compiled_nothing_is_forgotten(tmp_path, monkeypatch):
    trainer = trainers.causal_trainer(tmp_path)
    monkeypatch.setattr(torch.compiler, "reset", None)
    compile_anew(trainer)
    assert not is_compiled(trainer)


def test_a_trainer_that_will_compile_is_known_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the trainer's arguments set it
    trainer = trainers.causal_trainer(tmp_path, torch_compile_backend="eager")
    assert is_compiled(trainer)
