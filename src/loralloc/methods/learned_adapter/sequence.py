"""Convolutions over tokens, right with padding, packed sequences and a cache.

An adapter sees hidden states only. Which of them are padding, where sequences begin and what came
before is known to the backbone, whose arguments are read as it is called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

WINDOW = 3
"""Tokens that a convolution reads."""


class LastTokens(DynamicLayer):
    """What convolutions read of the tokens before: one more layer of the model's own cache.

    So it is reordered with the beams, and repeated and selected with the rows. Its "keys" have the
    shape (batch, num_convolutions, WINDOW - 1, bottleneck).
    """

    is_croppable = False

    def update(self, states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the place of what was there before."""
        self.lazy_initialization(states, states)
        self.keys, self.values = states, states[..., :0]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse.

        Raises:
            ValueError: Tokens would be taken back.
        """
        if tokens_to_remove:
            raise ValueError(
                f"The cache was to be shortened by {abs(tokens_to_remove)} tokens, but adapters "
                "with a convolution keep only the last two; generate without an assistant."
            )


class Sequences:
    """What a backbone is reading, for all adapters in it.

    Args:
        is_causal: Whether a token may depend on those before it only; otherwise a window lies
            around its token.
    """

    def __init__(self, *, is_causal: bool) -> None:
        self.is_causal = is_causal
        self._mask: Any = None
        self._positions: Tensor | None = None
        self._before: Tensor | None = None
        self._last: list[Tensor] = []

    def follow(self, backbone: nn.Module) -> None:
        """Know from now on what the backbone reads."""
        backbone.register_forward_pre_hook(functools.partial(_begin, self), with_kwargs=True)
        backbone.register_forward_hook(functools.partial(_end, self))

    def begin(self, mask: Any, positions: Any, cache: Any) -> None:
        """Take up the arguments of one call."""
        self._mask, self._last = mask, []
        self._positions = positions if isinstance(positions, Tensor) else None
        past = _last_tokens(cache)
        self._before = past.keys if past is not None else None

    def end(self, cache: Any) -> None:
        """Leave the last tokens with the cache, where there is one."""
        if cache is not None and self._last:
            past = _last_tokens(cache)
            if past is None:  # not before the model's own layers have theirs
                past = LastTokens()
                cache.layers.append(past)
            past.update(torch.stack([state.to(self._last[0].device) for state in self._last], 1))
        self._before, self._last = None, []

    def convolve(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Mix every channel of a token with that of its neighbours, padding and others left out.

        Args:
            hidden: Shape (batch, length, bottleneck).
            weight: Shape (WINDOW, bottleneck), the last row for the latest token.
        """
        length = hidden.shape[1]
        hidden = self._without_padding(hidden)
        if self.is_causal:
            padded = torch.cat([self._tokens_before(hidden), hidden], dim=1)
            self._last.append(padded[:, length:].detach().clone())
        else:
            padded = F.pad(hidden, (0, 0, WINDOW // 2, WINDOW // 2))
        weight = weight.to(hidden.dtype)
        mixed = padded[:, WINDOW - 1 :] * weight[-1]
        for back in range(1, WINDOW):
            start = WINDOW - 1 - back
            term = padded[:, start : start + length] * weight[start]
            mixed = mixed + self._within_sequence(term, back)
        return mixed

    def _tokens_before(self, hidden: Tensor) -> Tensor:
        if self._before is None:
            return hidden.new_zeros(len(hidden), WINDOW - 1, hidden.shape[2])
        # Adapters run in the same order in every call, so the n-th reads what the n-th left.
        return self._before[:, len(self._last)].to(hidden)

    def _without_padding(self, hidden: Tensor) -> Tensor:
        if self._mask is None:
            return hidden
        if not isinstance(self._mask, Tensor) or self._mask.ndim != 2:
            raise TypeError(
                "The attention mask is not one number a token, so adapters with a convolution "
                "cannot tell what is padding; give a mask of shape (batch, length), and generate "
                "with a dynamic cache."
            )
        return hidden * self._mask[:, -hidden.shape[1] :, None].to(hidden)

    def _within_sequence(self, term: Tensor, back: int) -> Tensor:
        """Leave out tokens of the sequence before, in a row that holds several."""
        positions = self._positions
        if not self.is_causal or positions is None or positions.ndim != 2:
            return term
        return term * (positions >= back)[..., None].to(term)


def is_causal(block: nn.Module) -> bool:
    """Whether a block's attention sees only what came before."""
    found: Iterable[Any] = (getattr(module, "is_causal", None) for module in block.modules())
    return next((bool(value) for value in found if value is not None), True)


def _begin(
    sequences: Sequences, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments
    sequences.begin(
        given.get("attention_mask"), given.get("position_ids"), given.get("past_key_values")
    )


def _end(sequences: Sequences, backbone: nn.Module, args: Any, output: Any) -> None:
    parts = output if isinstance(output, tuple) else output.to_tuple()
    sequences.end(next((part for part in parts if isinstance(part, Cache)), None))


def _last_tokens(cache: Any) -> LastTokens | None:
    layers = cache.layers if cache is not None else ()
    return next((layer for layer in layers if isinstance(layer, LastTokens)), None)
