"""Slots for prompts in front of a text, inside a backbone of Llama's, GPT-2's or BERT's shape.

Blocks see a few positions more than they were given; what leaves the backbone has the length of
the text again. Any block may write new prompts into the slots, made from the instruction's hidden
states there. All that a forward pass needs travels with it as one argument, so that passes do not
get into each other's way.

Text keeps its own positions, the slots all have position 0: no context is lost to them, and what a
decoder is told in generation stays right. Their order is in what is written into them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralloc.allocation.blocks import backbone, blocks, hidden_size
from loralloc.allocation.objective import Batch, is_causal_lm
from loralloc.allocation.supervised import IGNORED

SOFT_PROMPT = "soft_prompt"
"""The name under which the backbone holds what is in the slots before the first block."""

PASSED = "prompt_pass"
"""The argument of blocks that a forward pass with slots travels in."""

Writer = Callable[[Tensor, Tensor], Tensor]
"""New prompts from those in the slots and from the pooled instruction, all of them of shape
(batch, num_slots, width)."""


@dataclass(frozen=True)
class PromptPass:
    """What one forward pass carries from block to block."""

    pooling: Tensor
    """Shape (batch, num_slots, length): what of each token goes into each slot."""

    writers: Mapping[int, Writer]
    """What writes into the slots, by the index of the block that reads them next."""


class PromptSlots:
    """The slots of one backbone.

    Args:
        model: The backbone, with its head; it gets a float32 parameter, the soft prompt.
        num_slots: Prompts l.
        writers: Called as a forward pass begins; gives its `PromptPass.writers`.
    """

    def __init__(
        self, model: Any, num_slots: int, *, writers: Callable[[], Mapping[int, Writer]]
    ) -> None:
        self.num_slots = num_slots
        self._writers = writers
        self._watched: tuple[Tensor, Tensor] | None = None
        self._prompt_length: int | None = None  # while text is generated
        self._is_causal_lm = is_causal_lm(model)
        inner = backbone(model)
        self._embedding = inner.get_input_embeddings()
        self._is_encoder = hasattr(inner, "encoder")
        self._std = getattr(model.config, "initializer_range", 0.02)
        device = self._embedding.weight.device
        self._soft_prompt = nn.Parameter(torch.empty(num_slots, hidden_size(model), device=device))
        self.draw_soft_prompt()
        inner.register_parameter(SOFT_PROMPT, self._soft_prompt)
        inner.register_forward_pre_hook(self._open, with_kwargs=True)
        for index, block in enumerate(blocks(model)):
            hook = functools.partial(self._before_block, index)
            block.register_forward_pre_hook(hook, with_kwargs=True)
        if self._is_encoder:
            inner.embeddings.register_forward_hook(self._after_embeddings)
        # Where the blocks' output is whole for the last time: BERT's pooler reads a text's begin.
        last = inner.encoder if self._is_encoder else inner
        last.register_forward_hook(self._close, with_kwargs=True)
        if self._is_causal_lm:
            model.generate = functools.partial(self._generate, model.generate)

    @torch.no_grad()
    def draw_soft_prompt(self) -> None:
        """Draw what the slots hold before the first block, as embeddings are drawn."""
        self._soft_prompt.copy_(torch.randn(self._soft_prompt.shape) * self._std)

    def watch(self, batch: Batch) -> None:
        """Take from the labels of a language model's batch where each row's instruction ends.

        Raises:
            ValueError: Rows follow each other without padding.
        """
        ids, labels = batch["input_ids"], batch.get("labels")
        self._watched = None
        if not self._is_causal_lm or labels is None:
            return
        if "position_ids" in batch and "attention_mask" not in batch:
            raise ValueError(
                "Prompts are made from the instruction of a row, and the batch has several texts "
                "in one row (`padding_free` or `packing`); leave that out for this method."
            )
        self._watched = ids, (labels != IGNORED).cumsum(dim=1) == 0

    def _open(self, inner: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make room for the slots, or tell the model that its cache has them already."""
        kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        text: Any = embeddings if ids is None else ids
        batch_size, length = text.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"The attention mask has {mask.ndim} dimensions, but slots for prompts need one "
                "number a token; leave out the static cache, or whatever prepared the mask."
            )
        cache = kwargs.get("past_key_values")
        num_read = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            num_before = max(num_read - self.num_slots, 0)
            positions = torch.arange(num_before, num_before + length, device=text.device)[None]
        if num_read:
            more = {"attention_mask": None if mask is None else self._in_front(mask, 1)}
            return (), {**kwargs, **more, "position_ids": positions}
        if mask is None:
            mask = torch.ones(batch_size, length, dtype=torch.long, device=text.device)
        instruction = self._instruction(ids, mask, is_training=inner.training)
        kwargs[PASSED] = PromptPass(pooling(instruction, self.num_slots), self._writers())
        kwargs["attention_mask"] = self._in_front(mask, 1)
        if not self._is_encoder:
            embeddings = self._embedding(ids) if embeddings is None else embeddings
            kwargs |= {"input_ids": None, "inputs_embeds": self._with_soft_prompt(embeddings)}
            kwargs["position_ids"] = self._in_front(positions, 0)
        return (), kwargs

    def _instruction(self, ids: Tensor | None, mask: Tensor, *, is_training: bool) -> Tensor:
        """Which tokens prompts may be made from: those that a response is not among."""
        is_text = mask.bool()
        if self._prompt_length is not None:
            return is_text & (torch.arange(mask.shape[1], device=mask.device) < self._prompt_length)
        if self._watched is not None and ids is not None:
            seen, is_before = self._watched
            if ids is seen or _begins_with(seen, ids):
                return is_text & is_before[: len(ids)].to(mask.device)
        if self._is_causal_lm and is_training:
            raise RuntimeError(
                "The model is training on a batch whose labels its prompts have not been shown, so "
                "they would be made from the response too; call the method's `watch(batch)` first."
            )
        return is_text

    def _before_block(
        self, index: int, _: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        passed: PromptPass | None = kwargs.pop(PASSED, None)
        if passed is None or index not in passed.writers:
            return args, kwargs
        hidden = args[0]
        slots, text = hidden[:, : self.num_slots], hidden[:, self.num_slots :]
        written = passed.writers[index](slots, passed.pooling.to(hidden) @ text)
        return (torch.cat([written, text], dim=1), *args[1:]), kwargs

    def _after_embeddings(self, module: Any, args: Any, embeddings: Tensor) -> Tensor:
        return self._with_soft_prompt(embeddings)

    def _close(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Give the text alone to what follows."""
        if PASSED in kwargs:
            output.last_hidden_state = output.last_hidden_state[:, self.num_slots :]
        return output

    def _generate(self, generate: Callable[..., Any], inputs: Any = None, **kwargs: Any) -> Any:
        """Generate, knowing where the instruction ends even where every step reads all anew."""
        given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self._prompt_length = next((t.shape[1] for t in given if t is not None), 1)
        try:
            return generate(inputs, **kwargs)
        finally:
            self._prompt_length = None

    def _with_soft_prompt(self, embeddings: Tensor) -> Tensor:
        soft_prompt = self._soft_prompt.to(embeddings).expand(len(embeddings), -1, -1)
        return torch.cat([soft_prompt, embeddings], dim=1)

    def _in_front(self, numbers: Tensor, value: int) -> Tensor:
        return functional.pad(numbers, (self.num_slots, 0), value=value)


def _begins_with(seen: Tensor, ids: Tensor) -> bool:
    """Whether rows are the first of those that were seen."""
    is_like = ids.shape[1] == seen.shape[1] and len(ids) <= len(seen)
    return is_like and torch.equal(ids, seen[: len(ids)].to(ids.device))


def pooling(instruction: Tensor, num_slots: int) -> Tensor:
    """Adaptive average pooling over the instruction of each row, as a matrix.

    Of n tokens, slot j averages those from floor(j n / l) to ceil((j + 1) n / l); a row without an
    instruction has zeros.

    Args:
        instruction: True at the tokens to pool over, shape (batch, length).
        num_slots: l.

    Returns:
        Shape (batch, num_slots, length), float32; times hidden states (batch, length, width) it
        gives their averages (batch, num_slots, width).
    """
    order = instruction.cumsum(dim=1)[:, None] - 1  # (batch, 1, length), place in the instruction
    n = instruction.sum(dim=1)[:, None, None]
    slot = torch.arange(num_slots, device=instruction.device)[:, None]
    start, end = slot * n // num_slots, -(-(slot + 1) * n // num_slots)  # (batch, num_slots, 1)
    members = instruction[:, None] & (order >= start) & (order < end)
    return members.float() / (end - start).clamp(min=1)
