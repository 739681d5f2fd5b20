"""SPT's prompt generator, row by row: P = W_up relu(Pool_l(W_down H))."""

import math

import torch


def adaptive_pool(hidden: torch.Tensor, num_slots: int) -> torch.Tensor:
    """From (n, width) to (num_slots, width): means of stretches that cover the n positions."""
    n = len(hidden)
    if n == 0:
        return hidden.new_zeros(num_slots, hidden.shape[1])
    rows = []
    for j in range(num_slots):
        start, end = math.floor(j * n / num_slots), math.ceil((j + 1) * n / num_slots)
        rows.append(hidden[start:end].mean(dim=0))
    return torch.stack(rows)


def generate_prompts(hidden, instruction, down, up, num_slots):
    """Prompts (batch, num_slots, width) from hidden states (batch, length, width) of the text.

    The instruction is a mask (batch, length).
    """
    prompts = []
    for states, is_instruction in zip(hidden, instruction, strict=True):
        inner = states[is_instruction.bool()] @ down.T
        prompts.append(torch.relu(adaptive_pool(inner, num_slots)) @ up.T)
    return torch.stack(prompts)
