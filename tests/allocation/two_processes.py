"""Two processes that score and decide together; what each saw goes into a JSON file.

Started by `test_replicas.py` as `two_processes.py FOLDER`: rank N writes `FOLDER/N.json`.
"""

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist

from loralloc.allocation import replicas
from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.allocation.policy import Plan, Scores


def words_of(error, action):
    """What an action says when it raises; None where it does not."""
    try:
        action()
    except error as raised:
        return str(raised)
    return None


def mean(rank):
    importance = {"a": torch.tensor([1.0, 2.0 + rank]), "b": torch.tensor([[4.0], [-2.0]][rank])}
    scores = Scores(
        terms={"share": importance},
        s_full=-1.0 - rank,
        s_base=None,
        verified=[{"a": (0, 1), "b": (0,)}, {"a": (1,)}][rank],
        settled=rank == 0,
    )
    found = replicas.mean(scores)
    return {
        "terms": {name: values.tolist() for name, values in found.importance.items()},
        "dtypes": sorted({str(values.dtype) for values in found.importance.values()}),
        "rest": [found.s_full, found.s_base, found.settled],
        "verified": {name: list(indices) for name, indices in found.verified.items()},
    }


def agreed(rank):
    plan = Plan(kept={"a": (rank,)}, added={"a": 1 + rank}, pruned={"a": (1 - rank,)}, spare=rank)
    found = replicas.agreed(plan)
    return [found.kept["a"], found.added["a"], found.pruned["a"], found.spare]


def differences(rank):
    def pair(other=0.0, added=0):
        a = torch.nn.Parameter(torch.ones(2 + added, 3))
        b = torch.nn.Parameter(torch.ones(4, 2 + added, dtype=torch.bfloat16))
        with torch.no_grad():
            b[0, 0] += other
        return a, b

    def compare(a, b, kept=None):
        optimizer = torch.optim.SGD([a, b])
        optimizer.state[a] = {"momentum_buffer": torch.zeros(a.shape if kept is None else kept)}
        replicas.check_equal(replicas.by_part({"m": (a, b)}), optimizer)

    return {
        "none": words_of(RuntimeError, lambda: compare(*pair())),
        "a value": words_of(RuntimeError, lambda: compare(*pair(other=float(rank)))),
        "a shape": words_of(RuntimeError, lambda: compare(*pair(added=rank))),
        "a state": words_of(RuntimeError, lambda: compare(*pair(), kept=(2 + rank, 3))),
    }


def shared(rank):
    drawn, given, nothing = torch.full((2,), float(rank)), torch.zeros(2), torch.zeros(1)
    replicas.share([drawn])
    if rank:
        given.grad = torch.tensor([2.0, 4.0])
    replicas.average_gradients([given, nothing])
    return {
        "shared": drawn.tolist(),
        "averaged": {n: x.tolist() for n, x in replicas.averaged({"a": drawn + rank}).items()},
        "gradient": [given.grad.tolist(), nothing.grad],
        "total": replicas.total(rank + 1),
        "weight": replicas.weight(1 + 2 * rank),
        "any": [replicas.any_of(rank == 1), replicas.any_of(False)],
        "agreed": replicas.agreed(f"by {rank}"),
        "gathered": replicas.gathered(rank),
        "first": replicas.is_first(),
    }


class Unsendable(ValueError):
    def __reduce__(self):
        raise TypeError("no")


def together(rank):
    def fails(who, error):
        def action():
            if rank == who:
                raise error
            return rank

        return words_of((ValueError, RuntimeError), lambda: replicas.together(action))

    return {
        "well": replicas.together(lambda: rank),
        "in the first": fails(0, ValueError("too small")),
        "in the second": fails(1, ValueError("too large")),
        "unsendable": fails(1, Unsendable("odd")),
        "all": words_of(ValueError, lambda: replicas.together(lambda: int(f"no {rank}"))),
    }


def rounds(rank):
    """Two rounds on held-out examples of its own, then one in which the processes differ."""
    model = tiny.adapted(tiny.llama())
    optimizer, batch = tiny.optimizer_for(model), tiny.batch_for(model)
    tiny.train(model, batch, 3, optimizer)
    own = tiny.batch_for(model, seed=5 + rank)
    allocator = Allocator(model, AllocationConfig(seed=3), [own])
    alone = allocator._objective.mean_loss()
    for _ in range(2):
        allocator.step(optimizer)
        tiny.train(model, batch, 2, optimizer)
    record = allocator.record.as_data()
    for entry in record["rounds"]:
        del entry["seconds"]
    layer = next(iter(lora_layers(model).values()))
    with torch.no_grad():
        weight_b(layer)[0, 0] += rank
    differs = words_of(RuntimeError, lambda: allocator.step(optimizer))
    with torch.no_grad():
        weight_b(layer)[0, 0] = float("nan") if rank else 0.0
    not_finite = words_of(ScoringError, lambda: allocator.step(optimizer))
    return {
        "alone": alone,
        "record": record,
        "differs": differs,
        "not finite": not_finite,
    }


def be(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    seen = {f.__name__: f(rank) for f in (mean, agreed, differences, shared, together, rounds)}
    seen["count"] = replicas.count()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def main(folder):
    gc.freeze()
    second = os.fork()  # to import all again would take longer than what both do
    if not second:
        be(1, folder)
        return
    be(0, folder)
    _, status = os.waitpid(second, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
