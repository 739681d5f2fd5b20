"""Rounds in a run with mixed precision, which TRL switches on by default."""

import pytest
import rounding
import tiny
import torch
from reference import importance as reference
from trainers import causal_trainer, options
from transformers import TrainerCallback

from loralloc import attach
from loralloc.training.batches import draw


class Snapshot(TrainerCallback):
    """The weights as the first round finds them: it acts before the round."""

    def on_step_end(self, args, state, control, *, model, **_):
        if state.global_step == 3:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def test_exact_scores_are_those_of_float32(tmp_path):
    before = Snapshot()
    trainer = causal_trainer(tmp_path, bf16=True)
    trainer.add_callback(before)
    allocation = attach(trainer, options(score="ablation"))
    trainer.train()
    first = allocation.record.rounds[0]
    assert first.settled

    model = tiny.adapted(tiny.llama(), r=2)
    model.load_state_dict(before.weights)
    batches = draw(trainer, trainer.eval_dataset, num_examples=4, seed=3)
    batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    paper = reference.ablation(model, batch)
    atol = rounding.of_losses(model, paper.s_full, paper.s_base)
    assert first.s_full == pytest.approx(paper.s_full, abs=atol)
    largest = 0.0
    for name, without in paper.s_without.items():
        expected = (paper.s_full - without).tolist()
        assert first.terms["without"][name] == pytest.approx(expected, abs=atol)
        expected = (paper.s_only[name] - paper.s_base).tolist()
        assert first.terms["only"][name] == pytest.approx(expected, abs=atol)
        largest = max(largest, *map(abs, expected))
    assert largest > 100 * atol


def test_training_goes_on_in_mixed_precision_after_a_round(tmp_path):
    seen = []
    trainer = causal_trainer(tmp_path, bf16=True, max_steps=4)
    head = trainer.model.get_base_model().lm_head
    head.register_forward_hook(
        lambda module, args, output: seen.append((torch.is_grad_enabled(), output.dtype))
    )
    attach(trainer, options(num_rounds=1))
    trainer.train()
    assert seen[0] == (False, torch.float32)  # attach's first look
    assert [dtype for _, dtype in seen[1:4]] == [torch.bfloat16] * 3
    assert {dtype for _, dtype in seen[4:-1]} == {torch.float32}
    assert seen[-1] == (True, torch.bfloat16)


@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_bfloat16_backbone_ablation_is_refused_before_the_first_step(bf16, tmp_path):
    model = tiny.adapted(tiny.llama().to(torch.bfloat16), r=2)
    trainer = causal_trainer(tmp_path, model=model, bf16=bf16)
    with pytest.raises(ValueError, match=r"computes in bfloat16.* use 'gradient' or 'screened'"):
        attach(trainer, options(score="ablation"))


def test_screened_scores_of_a_bfloat16_backbone_are_not_called_settled(tmp_path):
    model = tiny.adapted(tiny.llama().to(torch.bfloat16), r=2)
    trainer = causal_trainer(tmp_path, model=model, bf16=True)
    allocation = attach(trainer, options(score="screened"))
    trainer.train()
    assert not any(entry.settled or entry.verified for entry in allocation.record.rounds)


def test_screened_scores_of_a_float32_backbone_are_verified(tmp_path):
    trainer = causal_trainer(tmp_path, bf16=True)
    allocation = attach(trainer, options(score="screened", verify_ranks=1000))
    trainer.train()
    assert all(entry.settled and entry.verified for entry in allocation.record.rounds)
