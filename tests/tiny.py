"""Models small enough for a test of milliseconds: 2 blocks, width 32, 64 words, no dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64
PADDING = 0
IGNORED = -100

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
# Not "dense": BERT's pooler is one too, outside the blocks.
BERT_TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator seeded inside, and as it was outside."""
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which writes down the whole stack for GPUs that come later.
        torch.default_generator.manual_seed(int(seed))
        yield


def llama(**overrides) -> LlamaForCausalLM:
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PADDING,
    )
    return _build(LlamaForCausalLM, LlamaConfig(**{**options, **overrides}))


def gpt2(**overrides) -> GPT2LMHeadModel:
    options = dict(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PADDING,
    )
    return _build(GPT2LMHeadModel, GPT2Config(**{**options, **overrides}))


def mixture(**overrides) -> Qwen3MoeForCausalLM:
    """A mixture of experts; `mlp_only_layers=[0]` makes one block dense."""
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=64,
        pad_token_id=PADDING,
    )
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**options, **overrides}))


def bert_classifier(num_labels: int = 3, **overrides) -> BertForSequenceClassification:
    config = BertConfig(num_labels=num_labels, **{**_ENCODER, **overrides})
    return _build(BertForSequenceClassification, config)


def roberta_classifier(num_labels: int = 3, **overrides) -> RobertaForSequenceClassification:
    config = RobertaConfig(num_labels=num_labels, **{**_ENCODER, **overrides})
    return _build(RobertaForSequenceClassification, config)


def t5(**overrides) -> T5ForConditionalGeneration:
    """An encoder and a decoder: two lists of blocks."""
    options = dict(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PADDING,
        decoder_start_token_id=PADDING,
    )
    return _build(T5ForConditionalGeneration, T5Config(**{**options, **overrides}))


_ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=PADDING,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def _build(model_class, config):
    with seeded(0):
        # Wide weights: with the usual 0.02 so small a model says the same whatever it reads.
        config.initializer_range = 0.15
        return model_class(config).eval()


MODELS = (llama, gpt2, bert_classifier, roberta_classifier)


def adapted(model: nn.Module, r: int = 4, lora_alpha: float = 8, **lora_options) -> PeftModel:
    """The model, evaluating, with LoRA on every linear layer of its blocks; every B is zero."""
    options = dict(r=r, lora_alpha=lora_alpha, **_of_kind(model))
    with seeded(1):
        return get_peft_model(model, LoraConfig(**{**options, **lora_options})).eval()


def _of_kind(model: nn.Module) -> dict:
    if isinstance(model, LlamaForCausalLM):
        return dict(target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")
    if isinstance(model, GPT2LMHeadModel):
        return dict(target_modules=GPT2_TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM")
    if isinstance(model, T5ForConditionalGeneration):
        return dict(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    return dict(target_modules=BERT_TARGETS, task_type="SEQ_CLS")


def with_trained_b(model: PeftModel, scale: float = 0.1, seed: int = 2) -> PeftModel:
    """The adapted model with a normal B of the given standard deviation, as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def checkpointing(model: PeftModel) -> PeftModel:
    """The model with the activations of its blocks computed again in the backward pass."""
    base = model.get_base_model()
    base.config.use_cache = False
    # The second is the name before Transformers 5.22.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model


def optimizer_for(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr)


def train(
    model: nn.Module,
    batch: dict[str, Tensor],
    num_steps: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """So many optimiser steps on one batch; the gradients are cleared afterwards."""
    optimizer = optimizer or optimizer_for(model)
    for _ in range(num_steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def causal_batch(
    num_examples: int = 6, length: int = 12, prompt_length: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Examples of unequal length, padded at the end; prompts and padding carry no label."""
    batch = _padded_batch(num_examples, length, prompt_length + 2, seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels[:, :prompt_length] = IGNORED
    return {**batch, "labels": labels}


def classification_batch(
    num_examples: int = 6, length: int = 12, num_labels: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """Examples of unequal length, padded at the end, with one label each."""
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(num_labels, (num_examples,), generator=generator)
    return {**_padded_batch(num_examples, length, 3, seed), "labels": labels}


def batch_for(model: nn.Module, num_examples: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A batch of the kind the model reads."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    is_classifier = type(inner).__name__.endswith("ForSequenceClassification")
    return (classification_batch if is_classifier else causal_batch)(num_examples, seed=seed)


def _padded_batch(num_examples: int, length: int, shortest: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (num_examples, length), generator=generator)
    lengths = torch.randint(shortest, length + 1, (num_examples,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask + PADDING * (1 - mask), "attention_mask": mask}


def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch in pieces of at most `size` examples."""
    num_examples = len(batch["labels"])
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start in range(0, num_examples, size)
    ]
