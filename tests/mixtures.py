"""Tiny mixtures of experts, whose loss holds one of their router's."""

import tiny
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_SIZES = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    pad_token_id=tiny.PADDING,
    bos_token_id=1,
    eos_token_id=2,
)


def mixtral(**overrides) -> MixtralForCausalLM:
    options = dict(num_attention_heads=4, output_router_logits=True, router_aux_loss_coef=0.5)
    return tiny._build(MixtralForCausalLM, MixtralConfig(**{**_SIZES, **options, **overrides}))


def qwen3_moe(**overrides) -> Qwen3MoeForCausalLM:
    options = dict(num_attention_heads=4, output_router_logits=True, router_aux_loss_coef=0.5)
    experts = dict(num_experts=4, moe_intermediate_size=16, head_dim=8)
    return tiny._build(
        Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_SIZES, **options, **experts, **overrides})
    )


def jetmoe(**overrides) -> JetMoeForCausalLM:
    """Has another name for the weight of its router's loss."""
    options = dict(kv_channels=8, output_router_logits=True, aux_loss_coef=0.5)
    return tiny._build(JetMoeForCausalLM, JetMoeConfig(**{**_SIZES, **options, **overrides}))


def adapted(model):
    """The model with LoRA below its routers, so that their loss has a gradient there."""
    return tiny.with_trained_b(
        tiny.adapted(model, target_modules=r".*(q_proj|v_proj|kv_proj)", task_type="CAUSAL_LM")
    )
