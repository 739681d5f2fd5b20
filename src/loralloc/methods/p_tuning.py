"""P-tuning v2 (Liu et al. 2022), by PEFT: learned keys and values before those of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PrefixTuningConfig, TaskType
from torch import nn
from transformers.utils import ModelOutput

from loralloc.allocation.objective import Batch
from loralloc.methods.method import About
from loralloc.methods.peft_method import PeftMethod
from loralloc.methods.session import Session

NATIVE_TOKENS = 20
"""Tokens of the authors for tasks of classification."""


@dataclass(kw_only=True)
class PTuning(PeftMethod):
    """Every attention layer sees p learned keys and values besides those of the text.

    They are weights themselves (no network makes them), and no position is rotated into them; the
    text's positions begin at p. Of keys and values that several heads share there is one each.
    """

    virtual_tokens: int | None = None
    """p; None for what the budget allows."""

    native: bool = False
    """Whether p is 20, which suffices for tasks of classification (Liu et al. 2022, Section 3),
    whatever the budget: at LoRA's, prompts are many times as long as a short text."""

    init_std: float = 0.02
    """Standard deviation of keys and values at the start, as Transformers begins embeddings, the
    authors' among them; PEFT's are of PyTorch's 1, which disturbs a language model far more."""

    _positions: int | None = field(default=None, init=False, repr=False, compare=False)

    about: ClassVar[About] = About(
        name="p-tuning-v2",
        title="P-tuning v2",
        paper="Liu et al. 2022",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=7e-3,
        rate_from="the authors' script for BoolQ (RoBERTa-large)",
        differs="Nothing of keys and values is dropped out in training, where the authors drop a "
        "tenth.",
        starts_as_base=False,
        why_not_base="every token attends to the learned keys from the first step on",
        shares_prompts=False,
    )
    size: ClassVar[str] = "virtual_tokens"
    paper: ClassVar[Mapping[str, Any]] = {"virtual_tokens": 80}

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The number of tokens is given twice.
        """
        if self.native and self.virtual_tokens not in (None, NATIVE_TOKENS):
            raise ValueError(
                f"`native` takes {NATIVE_TOKENS} tokens, but `virtual_tokens` is "
                f"{self.virtual_tokens}; leave out one of the two."
            )

    def fit(self, model: nn.Module, budget: int) -> None:
        """See `Method.fit`; the native size is what it is."""
        if self.native:
            self.virtual_tokens = NATIVE_TOKENS
        super().fit(model, budget)

    def count(self, model: Any, size: int) -> int:
        """See `Method.count`."""
        config = model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        return int(size * 2 * config.num_hidden_layers * shared * width)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        self._positions = learned_positions(model)
        prepared = super().prepare(model, task_type=task_type, heads=heads)
        nn.init.normal_(prepared.prompt_encoder["default"].embedding.weight, std=self.init_std)
        prepared.get_base_model().register_forward_hook(_forget_uncached, with_kwargs=True)
        return prepared

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`."""
        saved = getattr(PeftConfig.from_pretrained(str(folder)), "num_virtual_tokens", None)
        if saved != self.virtual_tokens:
            raise ValueError(
                f"The adapter in {folder} was begun with `virtual_tokens` of {saved}, and now it "
                f"is {self.virtual_tokens}; go on with the value that it was begun with."
            )

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: Activations are computed again in the backward pass.
        """
        if any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise ValueError(
                "`gradient_checkpointing` takes away the keys and values that p-tuning-v2 trains; "
                "leave it out, or use another method."
            )

    def watch(self, batch: Batch) -> None:
        """See `Method.watch`.

        Raises:
            ValueError: The prefix leaves too few of the learned positions for the text.
        """
        length, taken = batch["input_ids"].shape[1], self.virtual_tokens
        if self._positions is not None and length + taken > self._positions:
            raise ValueError(
                f"The backbone has {self._positions} positions, of which {taken} are taken by the "
                f"prefix, and a text has {length} tokens; cut texts shorter or use fewer "
                "`virtual_tokens`."
            )

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.virtual_tokens is not None, "fit() chooses it"
        return PrefixTuningConfig(
            num_virtual_tokens=self.virtual_tokens,
            task_type=task_type,
            modules_to_save=list(heads) or None,
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a backbone has weights for; None where positions are computed."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind that of its padding.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return None


def _forget_uncached(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    # The prefix is handed over as a cache, which Llama gives back even where none is wanted, and
    # generation would go on from it.
    if kwargs.get("use_cache") is not False or not isinstance(output, ModelOutput):
        return output
    kept = {name: value for name, value in output.items() if name != "past_key_values"}
    return type(output)(**kept)
