"""LoRA with given ranks: what files give them, and that they are what trains."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from session import BUILDS, Drive, prepared

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.resize import resize
from loralloc.methods.alora import Alora
from loralloc.methods.pattern import Pattern, read_ranks

NAMES = ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]


def written(folder, data, name="ranks.json"):
    path = folder / name
    path.write_text(json.dumps(data))
    return str(path)


def trained(path):
    return prepared(Pattern(file=str(path)), tiny.llama())


def test_the_ranks_that_a_run_ended_with_train_from_scratch(tmp_path):
    config = AllocationConfig(
        num_rounds=3, warmup_epochs=0.4, recovery_epochs=0.1, ranks_per_round=9
    )
    run = prepared(Alora(rank=2, allocation=config), tiny.llama())
    Drive(run, num_steps=20).begin().train()
    run.finish()
    run.save(tmp_path)
    expected = ranks(lora_layers(run.model))
    assert len(set(expected.values())) > 1 and len(expected) < 14
    for path in (tmp_path, tmp_path / "allocation.json", tmp_path / "adapter_config.json"):
        method = trained(path)
        assert ranks(lora_layers(method.model)) == expected
        assert method.num_trained() == method.count(tiny.llama(), 0) == run.num_stored()
        scalings = {layer.scaling["default"] for layer in lora_layers(method.model).values()}
        assert scalings == {2.0}
        assert not any(
            layer.lora_B["default"].weight.any() for layer in lora_layers(method.model).values()
        )


def test_the_ranks_of_an_adapter_of_pefts(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.1\..*q_proj": 7}
    )
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    found = ranks(lora_layers(trained(tmp_path).model))
    assert found == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 4,
        "model.layers.1.self_attn.q_proj": 7,
        "model.layers.1.mlp.down_proj": 4,
    }


@pytest.mark.parametrize("shape", BUILDS)
def test_it_is_saved_as_stock_peft_with_its_ranks(shape, tmp_path):
    names = list(ranks(lora_layers(prepared(Alora(rank=1), BUILDS[shape]()).model)))
    given = {name: i % 3 for i, name in enumerate(names)}
    method = prepared(Pattern(file=written(tmp_path, given)), BUILDS[shape]())
    Drive(method, num_steps=4).begin().train()
    method.save(tmp_path / "saved")
    opened = PeftModel.from_pretrained(BUILDS[shape](), tmp_path / "saved")
    assert ranks(lora_layers(opened)) == {name: rank for name, rank in given.items() if rank}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"layers.0.q": 3, "v": 2}, [3, 2, None, 2]),
        ({"q": 1}, [1, None, 1, None]),
        ({r"layers\.1\..*": 5, ".*": 1}, [1, 1, 5, 5]),
        ({"q": 0, "v": 4}, [0, 4, 0, 4]),
    ],
)
def test_the_first_name_that_matches_gives_the_rank(data, expected, tmp_path):
    found = read_ranks(written(tmp_path, data), NAMES)
    assert found == {name: rank or 0 for name, rank in zip(NAMES, expected, strict=True)}
    config = {"peft_type": "LORA", "r": 9, "rank_pattern": data, "target_modules": ["q", "v"]}
    of_peft = read_ranks(written(tmp_path, config), NAMES)
    assert list(of_peft.values()) == [9 if rank is None else rank for rank in expected]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1], "holds a list and no object"),
        ({"q": 1.5}, "gives 'q' a rank of 1.5; it must be a whole number"),
        ({"q": -1}, "gives 'q' a rank of -1"),
        ({"q": "1" * 3000}, "gives 'q' a rank of '1{59}; it must be a whole number"),
        ({"k": 1}, "gives a rank to 'k', which is no linear layer of this model's blocks"),
        ({".*": 1, "q": 2}, "gives a rank to 'q', .* or one that an earlier name is for"),
        ({"q": 0}, "gives no module of this model a rank"),
        ({"peft_type": "IA3"}, "is of IA3, whose modules have no ranks"),
    ],
)
def test_what_gives_no_ranks_is_refused_in_a_sentence(data, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_ranks(written(tmp_path, data), NAMES)


def test_a_file_that_is_not_there_is_refused_with_what_could_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither allocation\.json nor"):
        read_ranks(tmp_path, NAMES)
    with pytest.raises(ValueError, match=r"cannot be read from .*; name a run folder"):
        read_ranks(tmp_path / "none.json", NAMES)
    with pytest.raises(ValueError, match=r"none was named; name .* with `--method.file`"):
        prepared(Pattern(), tiny.llama())
    with pytest.raises(ValueError, match="but the file of pattern names the modules"):
        Pattern(targets=["q_proj"])


def test_a_resumed_run_has_the_shapes_that_were_saved(tmp_path):
    file = written(tmp_path, {"q_proj": 3, "down_proj": 1})
    method = trained(file)
    Drive(method, num_steps=4).begin().train()
    method.save(tmp_path)
    again = trained(file)
    again.check_saved(tmp_path)
    again.load(tmp_path)
    for (_, p), (_, q) in zip(
        method.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q)
    other = trained(written(tmp_path, {"q_proj": 2}))
    resize(other.model, 1)
    with pytest.raises(ValueError, match="has a module that this model's adapter lacks"):
        other.load(tmp_path)
