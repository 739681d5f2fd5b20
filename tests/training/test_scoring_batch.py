import pytest
import tiny
import torch
from datasets import Dataset
from trainers import causal_rows, causal_trainer, classification_trainer

from loralloc.training.batches import draw


@pytest.fixture
def trainer(tmp_path):
    return causal_trainer(tmp_path)


def drawn_rows(batches):
    return sorted(tuple(row) for batch in batches for row in batch["input_ids"].tolist())


def test_examples_are_distinct_rows_of_the_development_set(trainer):
    dataset = causal_rows(20, seed=5)
    rows = drawn_rows(draw(trainer, dataset, num_examples=9, seed=0))
    assert len(set(rows)) == 9
    assert set(rows) <= {tuple(row) for row in dataset["input_ids"]}


def test_the_draw_follows_the_seed_alone(trainer):
    dataset = causal_rows(20, seed=5)
    torch.manual_seed(1)
    first = drawn_rows(draw(trainer, dataset, num_examples=9, seed=0))
    torch.manual_seed(2)
    assert drawn_rows(draw(trainer, dataset, num_examples=9, seed=0)) == first
    assert drawn_rows(draw(trainer, dataset, num_examples=9, seed=1)) != first


def test_the_global_generator_is_left_alone(trainer):
    before = torch.get_rng_state()
    draw(trainer, causal_rows(20), num_examples=9, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_are_half_of_trainings(trainer):
    batches = draw(trainer, causal_rows(20), num_examples=10, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 2, 2, 2]


CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@pytest.mark.parametrize("option", CHECKPOINTING)
def test_so_they_are_with_activation_checkpointing(option, trainer):
    setattr(trainer.args, option, True)
    batches = draw(trainer, causal_rows(20), num_examples=6, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [2] * 3


@pytest.mark.parametrize("option", CHECKPOINTING)
@pytest.mark.parametrize("why", ["reentrant", "not by layers of Transformers"])
def test_where_checkpointing_rests_while_scoring_a_micro_batch_is_one_example(option, why, trainer):
    setattr(trainer.args, option, True)
    if why == "reentrant":
        setattr(trainer.args, f"{option}_kwargs", {"use_reentrant": True})
    else:
        trainer.model = torch.nn.Linear(2, 2)
    batches = draw(trainer, causal_rows(20), num_examples=5, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [1] * 5


def test_examples_of_like_length_go_together(tmp_path):
    from transformers import DataCollatorForSeq2Seq

    class Padding(DataCollatorForSeq2Seq):
        def __call__(self, examples):
            longest = max(len(example["input_ids"]) for example in examples)
            padded = [
                example["input_ids"] + [0] * (longest - len(example["input_ids"]))
                for example in examples
            ]
            return {"input_ids": torch.tensor(padded), "labels": torch.tensor(padded)}

    trainer = causal_trainer(tmp_path)
    trainer.data_collator = Padding(tokenizer=None)
    ids = [[7] * (3 + number * 5 % 11) for number in range(12)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    batches = draw(trainer, dataset, num_examples=12, seed=0)
    lengths = sorted(len(row) for row in ids)
    assert [batch["input_ids"].shape[1] for batch in batches] == lengths[1::2]


def test_columns_that_the_model_does_not_read_are_left_out(tmp_path):
    trainer = classification_trainer(tmp_path)
    rows = {name: value.tolist() for name, value in tiny.classification_batch(8).items()}
    dataset = Dataset.from_dict({**rows, "source_row": list(range(8))})
    for given in (dataset, [dataset[index] for index in range(8)]):
        batch = draw(trainer, given, num_examples=8, seed=0)[0]
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("own", ["of the chosen", "of a set of its own"])
def test_a_trainer_with_an_evaluation_loader_of_its_own_makes_the_batches(own, tmp_path):
    trainer = causal_trainer(tmp_path, num_eval=20)
    own_rows = causal_rows(30, seed=7).with_format("torch")

    class Own(type(trainer)):
        def get_eval_dataloader(self, eval_dataset=None):
            rows = eval_dataset.with_format("torch") if own == "of the chosen" else own_rows
            return torch.utils.data.DataLoader(rows, batch_size=5)

    trainer.__class__ = Own
    batches = draw(trainer, trainer.eval_dataset, num_examples=10, seed=0)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5]
    found = {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}
    source = trainer.eval_dataset if own == "of the chosen" else own_rows
    assert found <= {tuple(torch.as_tensor(row).tolist()) for row in source["input_ids"]}
