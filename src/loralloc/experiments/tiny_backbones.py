"""Backbones of two blocks with random weights, built on the spot: for trying an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.experiments.files import locked
from loralloc.experiments.made_rows import MAKERS, made_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WIDTH, BLOCKS, HEADS, POSITIONS, VOCABULARY = 32, 2, 4, 2048, 512
PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"

NAMES = ("tiny-llama", "tiny-gpt2", "tiny-roberta")


def build(name: str, folder: Path) -> str:
    """The folder of a tiny backbone with its tokenizer, built where it is not there yet.

    Args:
        name: One of `NAMES`.
        folder: The folder of all tiny backbones.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"There is no tiny backbone {name!r}; use one of {', '.join(NAMES)}.")
    target = (folder / name).absolute()
    with locked(target):
        if not (target / "config.json").is_file():  # written last
            _build(name, target)
    return str(target)


def _build(name: str, target: Path) -> None:
    import torch

    tokenizer = _tokenizer(between_marks=name == "tiny-roberta")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(name, tokenizer)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target.with_name(name + "-weights"))
    for path in sorted(target.with_name(name + "-weights").iterdir(), key=_config_last):
        path.replace(target / path.name)
    target.with_name(name + "-weights").rmdir()


def _config_last(path: Path) -> bool:
    return path.name == "config.json"


def _model(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaModel,
    )

    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    # Wide weights: with the usual 0.02 so small a model says the same whatever it reads.
    spread = 0.1
    if name == "tiny-llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **ends, initializer_range=spread))
    if name == "tiny-gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=WIDTH,
            n_layer=BLOCKS,
            n_head=HEADS,
            n_positions=POSITIONS,
            initializer_range=spread,
            **ends,
        )
        return GPT2LMHeadModel(config)
    return RobertaModel(RobertaConfig(**sizes, **ends, initializer_range=spread, type_vocab_size=1))


def _tokenizer(*, between_marks: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has seen rows of every task: nothing is unknown to it.

    Args:
        between_marks: Whether it puts a text between <s> and </s>, as RoBERTa's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [str(row) for task in MAKERS for row in made_rows(task, {"train": 20})["train"]]
    tokenizer.train_from_iterator(texts, trainer)
    if between_marks:
        marks = [(mark, tokenizer.token_to_id(mark)) for mark in (BEGIN, END)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}",
            pair=f"{BEGIN} $A {END} {END} $B {END}",
            special_tokens=marks,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        cls_token=BEGIN,
        sep_token=END,
        model_max_length=POSITIONS,
    )
