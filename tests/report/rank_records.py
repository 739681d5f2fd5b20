"""Allocation records as a run writes them, made up."""

import random
from collections.abc import Sequence
from typing import Any

LLAMA = (
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
)
BERT = (
    *(f"attention.self.{kind}" for kind in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


def make_record(
    *,
    num_layers: int = 30,
    kinds: Sequence[str] = LLAMA,
    stack: str = "model.layers",
    outside: Sequence[str] = (),
    num_rounds: int = 8,
    moved: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Rounds that move `moved` ranks each between random modules, all of which start with 8."""
    draw = random.Random(seed)
    names = [f"{stack}.{i}.{kind}" for i in range(num_layers) for kind in kinds]
    names += outside
    ranks = {name: 8 for name in names}
    data: dict[str, Any] = {"version": 1, "config": {}, "initial_ranks": dict(ranks), "rounds": []}
    for number in range(1, num_rounds + 1):
        before = dict(ranks)
        for _ in range(moved):
            giver = draw.choice([name for name in names if ranks[name]])
            ranks[giver] -= 1
            ranks[draw.choice(names)] += 1
        entry = {"round": number, "ranks_before": before, "ranks_after": dict(ranks)}
        data["rounds"].append(entry)
    return data
