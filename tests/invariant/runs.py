"""The runs: tiny models, a few dozen steps in float32, and every draw from a seed.

All that they know of loralloc's insides is imported here; how a run went is read from the files
that it leaves.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import encoders
import tiny
from datasets import Dataset
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from loralloc import AllocationConfig, attach
from loralloc.runs.run import prepare, train

Trajectory = dict[str, Any]
"""What is recorded of a run: `losses` of its steps, `ranks` of its modules after each round and as
saved, and the last `development_loss`."""

TRAINER = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    # So high that by the first round ranks differ clearly, and no decision hangs on rounding.
    "learning_rate": 5e-3,
    "seed": 7,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
}
ROUNDS = {"num_rounds": 3, "warmup_epochs": 1, "recovery_epochs": 0.5, "scoring_examples": 8}
"""After steps 6, 9 and 12 of 24."""

NUM_TRAIN, NUM_VALIDATION = 48, 12

WORDS = """
the a of in is it film story place year good bad cold warm twice new old
Rome Ann Lee Bo Ek saw made who , . : ?
"""
"""All that the data says."""


def alora_llama(folder: Path) -> Trajectory:
    return _run(folder, _decoder(tiny.llama, folder), _phrases, lora_r=3, **ROUNDS)


def alora_gpt2(folder: Path) -> Trajectory:
    return _run(folder, _decoder(tiny.gpt2, folder), _phrases, score="screened", lora_r=3, **ROUNDS)


def classification(folder: Path) -> Trajectory:
    options = dict(task="sst2", score="sensitivity", lora_r=3, learning_rate=1e-2, **ROUNDS)
    return _run(folder, _encoder(folder), _reviews, **options)


def spans(folder: Path) -> Trajectory:
    options = dict(task="squad", max_length=48, lora_r=3, learning_rate=1e-2, **ROUNDS)
    return _run(folder, _encoder(folder), _questions, **options)


def adalora(folder: Path) -> Trajectory:
    options = {"method": "adalora", "lora_r": 2, "learning_rate": 2e-2}
    options["method.fits_parameters"] = False
    return _run(folder, _decoder(tiny.llama, folder), _phrases, **options)


def sora(folder: Path) -> Trajectory:
    options = dict(task="sst2", method="sora", lora_r=2, learning_rate=2e-2)
    return _run(folder, _encoder(folder), _reviews, **options)


def lst(folder: Path) -> Trajectory:
    options = {"method": "lst", "method.width": 16}
    return _run(folder, _decoder(tiny.llama, folder), _phrases, **options)


def resumed(folder: Path) -> Trajectory:
    """Stopped in step 11, and resumed from the checkpoint of step 8, between two rounds."""
    model = _decoder(tiny.llama, folder)
    options = dict(score="sensitivity", learning_rate=3e-3, lora_r=3, **ROUNDS)
    options |= dict(save_strategy="steps", save_steps=8)
    stopped = _prepare(folder, model, _phrases, **options)
    stopped.trainer.add_callback(_StopAfter(10))
    with suppress(_Stopped):
        train(stopped)
    train(_prepare(folder, model, _phrases, resume=True, **options))
    return _left_by_run(folder / "run")


def attached(folder: Path) -> Trajectory:
    """Transformers' own trainer, and one line of ours."""
    trainer = Trainer(
        model=tiny.adapted(tiny.llama(), r=3),
        args=TrainingArguments(output_dir=str(folder / "run"), report_to="none", **TRAINER),
        train_dataset=_dataset(tiny.causal_batch(NUM_TRAIN)),
        eval_dataset=_dataset(tiny.causal_batch(NUM_VALIDATION, seed=1)),
        data_collator=default_data_collator,
    )
    attach(trainer, AllocationConfig(score="ablation", **ROUNDS))
    trainer.train()
    trainer.save_model()
    return _trajectory(trainer.state.log_history, folder / "run")


RUNS: dict[str, Callable[[Path], Trajectory]] = {
    "alora-llama": alora_llama,
    "alora-gpt2": alora_gpt2,
    "classification": classification,
    "spans": spans,
    "adalora": adalora,
    "sora": sora,
    "lst": lst,
    "resumed": resumed,
    "attached": attached,
}


def _run(folder: Path, model: Path, rows: Callable[[int], list[dict]], **options) -> Trajectory:
    train(_prepare(folder, model, rows, **options))
    return _left_by_run(folder / "run")


def _prepare(
    folder: Path, model: Path, rows: Callable[[int], list[dict]], *, resume=False, **options
) -> Any:
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        lines = [json.dumps(row) + "\n" for row in rows(count)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    where = dict(model_name_or_path=model, dataset_name=folder / "data", output_dir=folder / "run")
    return prepare({"dtype": "float32", **TRAINER, **where, **options}, resume=resume)


def _left_by_run(folder: Path) -> Trajectory:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return _trajectory([json.loads(line) for line in lines], folder)


def _trajectory(log: list[dict], folder: Path) -> Trajectory:
    """What a trainer logged and a folder holds, to 8 digits."""
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    (*_, development_loss) = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert list(losses) == list(range(1, len(losses) + 1)), "one loss a step"
    return {
        "losses": [float(f"{loss:.8g}") for loss in losses.values()],
        "development_loss": float(f"{development_loss:.8g}"),
        "ranks": {**_ranks_by_round(folder), "saved": _saved_ranks(folder)},
    }


def _ranks_by_round(folder: Path) -> dict[str, dict[str, int]]:
    record = folder / "allocation.json"
    if not record.exists():
        return {}
    rounds = json.loads(record.read_text(encoding="utf-8"))["rounds"]
    return {f"after step {entry['step']}": entry["ranks_after"] for entry in rounds}


def _saved_ranks(folder: Path) -> dict[str, int]:
    """Rank of every module that is in the saved adapter; none of one that is not low-rank."""
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        return {}
    with safe_open(weights, "pt") as file:
        return {
            name.partition(".lora_A")[0]: file.get_slice(name).get_shape()[0]
            for name in sorted(file.keys())
            if ".lora_A" in name
        }


class _Stopped(Exception):
    """Stands for a kill: nothing of the trainer runs after it."""


class _StopAfter(TrainerCallback):
    """End a run from outside when a step is over."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise _Stopped


def _decoder(build: Callable[..., Any], folder: Path) -> Path:
    words = _tokenizer("$A")
    ends = dict(bos_token_id=None, eos_token_id=words.eos_token_id)
    model = build(vocab_size=len(words), pad_token_id=words.pad_token_id, **ends)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return folder / "model"


def _encoder(folder: Path) -> Path:
    """Without a head: the run draws one."""
    words = _tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    sizes = dict(vocab_size=len(words), pad_token_id=words.pad_token_id)
    with tiny.seeded(0):
        BertModel(BertConfig(**sizes, **encoders.SIZES)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return folder / "model"


def _tokenizer(single: str, pair: str | None = None) -> PreTrainedTokenizerBase:
    """One token a word. It is not trained, for training orders words of one count at random."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")
    vocabulary = {word: number for number, word in enumerate((*specials, *WORDS.split()))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "eos_token")
    named = dict(zip(names, specials, strict=True))
    inputs = ["input_ids", *(["token_type_ids"] if pair else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **named)


def _phrases(count: int) -> list[dict]:
    """Two words of the prompt together tell what follows."""
    things, kinds = ("film", "story", "place"), ("good", "bad", "cold", "warm")
    ends = ("in Rome", "of the year", "new twice", "a old year", "Ann Lee")
    return [
        {
            "prompt": f"the {things[i % 3]} is {kinds[i % 4]} :",
            "completion": f" {ends[(i % 3 + 2 * (i % 4)) % 5]}",
        }
        for i in range(count)
    ]


def _reviews(count: int) -> list[dict]:
    things, kinds = ("film", "story", "place"), ("good", "bad", "warm", "cold")
    return [
        {"sentence": f"the {things[i % 3]} of the year is {kinds[i % 4]}", "label": i % 2}
        for i in range(count)
    ]


def _questions(count: int) -> list[dict]:
    """Where the film is warm the second made it, where it is cold the first."""
    rows = []
    for i in range(count):
        first, second = (("Ann Lee", "Bo Ek"), ("Bo Ek", "Ann Lee"))[i % 2]
        kind, name = (("warm", second), ("cold", first))[i // 2 % 2]
        context = f"{first} saw the {kind} film in Rome, {second} saw it twice."
        answers = {"text": [name], "answer_start": [context.index(name)]}
        rows.append({"context": context, "question": "who made it?", "answers": answers})
    return rows


def _dataset(batch: dict[str, Any]) -> Dataset:
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
