"""Learned-Adapter's adapter token by token, and its score by whole forward passes.

An adapter is W_up op(act(W_down y)), where act and op are means over what there is to choose from:

    CS(o) = S(M) - S(M without o) + S(M with only o)
"""

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": functional.tanh,
}


def adapter(y: Tensor, mask: Tensor, weights, kept, *, is_causal: bool) -> Tensor:
    """What is added to y of shape (batch, length, width); mask is 0 where there is padding."""
    hidden = y @ weights["down"].T
    hidden = sum(ACTIVATIONS[name](hidden) for name in kept["activations"]) / len(
        kept["activations"]
    )
    outputs = {
        "identity": hidden,
        "mix": hidden @ weights["mix"].T,
        "convolution": convolve(hidden, mask, weights["convolution"], is_causal=is_causal),
    }
    mean = sum(outputs[name] for name in kept["operations"]) / len(kept["operations"])
    return mean @ weights["up"].T


def convolve(hidden: Tensor, mask: Tensor, kernel: Tensor, *, is_causal: bool) -> Tensor:
    """Three taps: the token and two before it, or its neighbours on both sides."""
    mixed = torch.zeros_like(hidden)
    for token in range(hidden.shape[1]):
        for tap in range(3):
            source = token + tap - (2 if is_causal else 1)
            if 0 <= source < hidden.shape[1]:
                mixed[:, token] += kernel[tap] * hidden[:, source] * mask[:, source, None]
    return mixed


def performance(model, places, batch, weights, kept, *, is_causal: bool) -> float:
    """S(.): minus the loss of a backbone with these adapters after its sublayers."""

    def add_at(name):
        def add(_module, _inputs, output):
            is_tuple = isinstance(output, tuple)
            y = output[0] if is_tuple else output
            y = y + adapter(
                y, batch["attention_mask"], weights[name], kept[name], is_causal=is_causal
            )
            return (y, *output[1:]) if is_tuple else y

        return add

    with ExitStack() as hooks, torch.no_grad():
        for name, module in places.items():
            hooks.callback(module.register_forward_hook(add_at(name)).remove)
        return -float(model(**batch).loss)


def scores(model, places, batch, weights, kept, *, is_causal: bool):
    """CS by adapter, choice and candidate: three forward passes for each."""

    def s(changed):
        return performance(model, places, batch, weights, changed, is_causal=is_causal)

    found = {}
    for name, choices in kept.items():
        found[name] = {}
        for choice, candidates in choices.items():
            found[name][choice] = {}
            for candidate in candidates:
                others = [other for other in candidates if other != candidate]
                without = {**kept, name: {**choices, choice: others}}
                alone = {**kept, name: {**choices, choice: [candidate]}}
                found[name][choice][candidate] = s(kept) - s(without) + s(alone)
    return found
