"""Rounds, checkpoints and resuming where the adapter is on a mixture's experts."""

import mixtures
import pytest
import tiny
from trainers import adapter, causal_trainer, losses, options, ranks_now, without_seconds

from loralloc import attach
from loralloc.allocation.layers import lora_layers, rank_cost

DOWN = "mlp.experts.down_proj"


def model_of():
    return tiny.adapted(
        mixtures.qwen3_moe(output_router_logits=False),
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=[DOWN, "mlp.experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )


def trainer_on_experts(folder, **changes):
    trainer = causal_trainer(folder, model=model_of(), **changes)
    config = options(budget="parameters", ranks_per_round=4, new_state="survivors")
    return trainer, attach(trainer, config)


def cost(model) -> int:
    layers = lora_layers(model)
    return sum(rank_cost(layer) * ranks_now(model)[name] for name, layer in layers.items())


def test_a_resumed_run_ends_as_one_never_stopped(tmp_path):
    whole, allocation = trainer_on_experts(tmp_path / "whole")
    before = cost(whole.model)
    whole.train()
    last = allocation.record.rounds[-1]
    moved = {name for entry in allocation.record.rounds for name in (*entry.pruned, *entry.added)}
    assert any("experts" in name for name in moved)
    assert cost(whole.model) + last.spare == before

    changes = dict(save_strategy="steps", save_steps=7)
    trainer_on_experts(tmp_path / "cut", **changes)[0].train()
    resumed, again = trainer_on_experts(tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-7"))
    assert without_seconds(again.record.rounds) == without_seconds(allocation.record.rounds)
    assert losses(resumed)[12] == pytest.approx(losses(whole)[12], rel=1e-6)
    tensors = adapter(resumed.model)
    assert all(tensors[name].equal(value) for name, value in adapter(whole.model).items())
    config = whole.model.peft_config["default"]
    assert all(hasattr(config, option) for option in ("exclude_modules", "target_parameters"))
