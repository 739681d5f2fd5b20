"""ALoRA's two ablation variants (Liu et al. 2024, Appendix F), element by element.

Nothing is fused, vectorised or shared: loops over elements for sensitivity, gates that are
parameters of an ordinary optimiser for DNAS.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from reference.importance import performance

Step = dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]
"""By module: A and B after an optimiser step, and the gradients that it used."""


def snapshot(model) -> Step:
    found = {}
    for name, layer in lora_layers(model).items():
        a, b = weight_a(layer), weight_b(layer)
        found[name] = tuple(t.detach().clone() for t in (a, b, a.grad, b.grad))
    return found


def element_score(products: Sequence[float], b1: float = 0.85, b2: float = 0.85) -> float:
    """s(w) = Ibar Ubar of one element, from w dL/dw of every step."""
    mean = deviation = 0.0
    for product in products:
        sensitivity = abs(product)
        mean = b1 * mean + (1 - b1) * sensitivity
        deviation = b2 * deviation + (1 - b2) * abs(sensitivity - mean)
    return mean * deviation


def sensitivity(steps: Sequence[Step]) -> dict[str, dict[str, Tensor]]:
    """s(g_i), mean_j s(A_ij) and mean_j s(B_ji) of every rank, by term and module."""
    terms: dict[str, dict[str, Tensor]] = {"gate": {}, "row": {}, "column": {}}
    for name in steps[0]:
        products_a = [(step[name][0] * step[name][2]).tolist() for step in steps]
        products_b = [(step[name][1] * step[name][3]).tolist() for step in steps]
        num_ranks, num_in, num_out = len(products_a[0]), len(products_a[0][0]), len(products_b[0])
        row, column, gate = [], [], []
        for i in range(num_ranks):
            of_row = [element_score([p[i][j] for p in products_a]) for j in range(num_in)]
            of_column = [element_score([p[j][i] for p in products_b]) for j in range(num_out)]
            row.append(sum(of_row) / num_in)
            column.append(sum(of_column) / num_out)
            # dL/dg_i = <B_i, dL/dB_i>, and g_i is 1.
            gate.append(element_score([sum(p[j][i] for j in range(num_out)) for p in products_b]))
        for term, values in (("gate", gate), ("row", row), ("column", column)):
            terms[term][name] = torch.tensor(values)
    return terms


class Alternation:
    """First-order DARTS: a step of a' on one batch, then a step of A and B on another."""

    def __init__(self, model, optimizer, *, lr: float, weight_decay: float) -> None:
        self.model, self.optimizer = model, optimizer
        self.logits = {
            name: torch.zeros(layer.r["default"], requires_grad=True)
            for name, layer in lora_layers(model).items()
        }
        self.gate_optimizer = torch.optim.Adam(
            list(self.logits.values()), lr=lr, betas=(0.5, 0.999), weight_decay=weight_decay
        )

    def gates(self) -> dict[str, Tensor]:
        return {name: 2 * torch.sigmoid(logit) for name, logit in self.logits.items()}

    def step(self, half_1, half_2) -> None:
        self.gate_optimizer.zero_grad()
        (-performance(self.model, half_2, self.gates())).backward()
        self.gate_optimizer.step()
        self.optimizer.zero_grad()
        (-performance(self.model, half_1, self.gates())).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
