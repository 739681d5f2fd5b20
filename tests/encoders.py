"""Tiny encoders with tokenizers of BERT's and of RoBERTa's kind, which know pairs of texts."""

from pathlib import Path

import tiny
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

KINDS = ("bert", "roberta")
WORDS = (
    "the film of the year is good and warm, the story of a cold place is bad",
    "Who made the film? Ann Lee made the film in Rome in 1998, and Bo Ek saw it.",
    "café naïve über résumé 1999 2001 U.S. (twice) it's",
)
"""What both vocabularies are made from; of other scripts they know single characters or bytes."""

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.1,
)


def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    return _wordpiece() if kind == "bert" else _byte_level()


def folder(kind: str, path: Path, positions: int = 64) -> Path:
    """An encoder without a head that reads so many tokens, saved with its tokenizer."""
    words = tokenizer(kind)
    options = dict(vocab_size=len(words), pad_token_id=words.pad_token_id, **SIZES)
    with tiny.seeded(0):
        if kind == "bert":
            model = BertModel(BertConfig(max_position_embeddings=positions, **options))
        else:
            # RoBERTa counts positions from behind that of its padding.
            positions += words.pad_token_id + 1
            model = RobertaModel(
                RobertaConfig(max_position_embeddings=positions, type_vocab_size=1, **options)
            )
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def _wordpiece() -> PreTrainedTokenizerBase:
    """Lower case, accents stripped, unknown words whole; [CLS] A [SEP] B [SEP] with two types."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        WORDS,
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False),
    )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), specials, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **named)


def _byte_level() -> PreTrainedTokenizerBase:
    """Every byte known; <s> A </s></s> B </s> without types."""
    specials = ["<s>", "<pad>", "</s>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    words.post_processor = processors.RobertaProcessing(
        ("</s>", words.token_to_id("</s>")),
        ("<s>", words.token_to_id("<s>")),
        trim_offsets=True,
        add_prefix_space=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
