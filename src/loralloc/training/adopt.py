"""Adapting the model of a trainer that was built around a bare backbone."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, TaskType
from transformers import Trainer

from loralloc.methods.method import Method
from loralloc.methods.peft_method import PEFT_HEADS, default_budget

TASK_TYPES = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.CAUSAL_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
"""What the classes of Transformers are for, by how their names end."""


def adopt(trainer: Trainer, method: Method) -> None:
    """Let a method that was not prepared adapt the trainer's model, before its optimiser exists.

    Raises:
        ValueError: The trainer has an optimiser already, or an adapted model.
        TypeError: It is not known what the model is for.
    """
    model: Any = trainer.model
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The trainer's model has an adapter already, and {method.about.name} makes its own; "
            "build the trainer without `peft_config`, or call attach() for LoRA that is there."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            f"The trainer has an optimiser already, which would not train what {method.about.name} "
            "adds; leave out `optimizers`, or call `method.prepare(model, ...)` before both."
        )
    kind = type(model).__name__
    task_type = next((t for ending, t in TASK_TYPES.items() if kind.endswith(ending)), None)
    if task_type is None:
        raise TypeError(
            f"It is not known what a {kind} is for (language model, classification or question "
            "answering); call `method.prepare(model, task_type=...)` before the trainer is built."
        )
    budget = default_budget(model)
    method.fit(model, budget)
    method.sized_for = budget if method.size else None
    heads = [name for name in PEFT_HEADS if hasattr(model, name)]
    device = next(model.parameters()).device
    adapted = method.prepare(model, task_type=task_type, heads=heads).to(device)
    trainer.model = trainer.model_wrapped = adapted
