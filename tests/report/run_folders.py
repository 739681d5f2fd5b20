"""Run folders as a run writes them, made up."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rank_records import LLAMA
from safetensors.numpy import save_file

from loralloc.allocation.record import Size

EVIL = '$\\frac{$</script><img src="http://127.0.0.1:9/x.png" onerror="window.hit=1">'
"""What somebody may have called something."""


def make_allocation(
    *,
    num_layers: int = 3,
    kinds: tuple[str, ...] = LLAMA[:4],
    rank: int = 4,
    num_rounds: int = 4,
    moved: int = 6,
    seed: int = 0,
    outside: tuple[str, ...] = (),
    terms: tuple[str, ...] = ("without", "only"),
) -> dict[str, Any]:
    """The content of an `allocation.json` whose rounds prune the ranks of lowest score."""
    draw = random.Random(seed)
    names = [f"model.layers.{i}.{kind}" for i in range(num_layers) for kind in kinds]
    ranks = {name: rank for name in (*names, *outside)}
    data: dict[str, Any] = {
        **{"version": 1, "config": {"score": "gradient"}, "initial_ranks": dict(ranks)},
        **{"round_steps": [], "note": "", "rounds": []},
    }
    for number in range(1, num_rounds + 1):
        scores = {
            term: {name: [draw.gauss(0.001, 0.01) for _ in range(n)] for name, n in ranks.items()}
            for term in terms
        }
        total = {
            (name, i): sum(of[name][i] for of in scores.values())
            for name, n in ranks.items()
            for i in range(n)
        }
        pruned: dict[str, list[int]] = {}
        for name, i in sorted(total, key=total.__getitem__)[:moved]:
            pruned.setdefault(name, []).append(i)
        added: dict[str, int] = {}
        for name in draw.choices(list(ranks), k=moved):
            added[name] = added.get(name, 0) + 1
        before = dict(ranks)
        for name in ranks:
            ranks[name] += added.get(name, 0) - len(pruned.get(name, []))
        entry = {
            **{"round": number, "step": 5 * number, "epoch": 0.1 * number, "score": "gradient"},
            **{"s_full": -1.0 / number, "s_base": -2.0, "terms": scores, "verified": {}},
            **{"settled": False, "pruned": pruned, "added": added, "ranks_before": before},
            **{"ranks_after": dict(ranks), "churn": None if number == 1 else 0.25, "lost": 0},
            **{"spare": 0, "seconds": 1.5},
        }
        data["rounds"].append(entry)
    return data


def make_run(
    folder: Path,
    *,
    method: str = "alora",
    seed: int = 0,
    rank: int = 4,
    loss: float = 0.5,
    allocation: dict[str, Any] | None = None,
    frontier: list[dict[str, Any]] | None = None,
    figures: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A finished run; "alora" with rounds, unless others are given, any other method without."""
    folder.mkdir(parents=True)
    values = {
        **{"method": method, "model_name_or_path": "models/tiny", "task": "sst2", "seed": seed},
        **{"lora_r": rank, "output_dir": str(folder), **(settings or {})},
    }
    written = {name: {"value": value, "source": "flag"} for name, value in values.items()}
    (folder / "settings.json").write_text(json.dumps(written))
    log: list[dict[str, Any]] = [
        {"step": step, "loss": loss + 1 / step, "epoch": step / 20} for step in range(2, 22, 2)
    ]
    log += [{"step": step, "eval_loss": loss + 0.5 / step} for step in (10, 20)]
    log += [{"step": 20, "train_runtime": 12.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if method == "alora" or allocation:
        data = allocation or make_allocation(rank=rank, seed=seed)
        if frontier:
            data["frontier"] = frontier
        (folder / "allocation.json").write_text(json.dumps(data))
    weights = {"a": np.zeros((rank, 8), np.float32), "b": np.zeros((8, rank), np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    if figures:
        (folder / "eval" / "sst2-test-beam5").mkdir(parents=True)
        entries = [{"name": name, "value": value} for name, value in figures.items()]
        text = json.dumps({"settings": {}, "figures": entries})
        (folder / "eval" / "sst2-test-beam5" / "eval.json").write_text(text)
    return folder


SIZES = [
    asdict(
        Size(
            step=step,
            parameters=parameters,
            ranks=parameters // 50,
            modules=12,
            loss=loss,
            worse_by=loss - 0.48,
            standard_error=0.01,
            kept=kept,
        )
    )
    for step, parameters, loss, kept in (
        (5, 4000, 0.5, True),
        (10, 2000, 0.48, True),
        (15, 900, 0.9, False),
    )
]
"""A frontier, as a record has it."""
