"""Every figure that only a GPU can show, in one go on a bare machine.

LLaMA-2-7B's shape and SmolLM2-135M's, with random weights made on the device. Each stage has a
limit of time, and the JSON is written after each, so that a machine that is taken away leaves what
it measured. Without a GPU the same stages run on a tiny shape: that shows that they run, and
nothing else. What a stage raises is written down in its place.

    equal       gradients of a small model: ours, with CUDA graphs too, and PEFT's, by precision
    launches    kernels of one block, forward and backward, as the profiler sees them
    long        4 x 1,024 tokens, all supervised: seconds and memory beyond the model
    short       16 x 72 tokens, a third supervised
    small       the same of the small shape
    compiled    the same under `torch.compile(mode="reduce-overhead")`, which is CUDA graphs
    halves      the small shape as users run it: autocast, bfloat16, float16 under a GradScaler
    mixed       a step with ranks of many sizes over one with 8 everywhere
    round       a round over training on as many examples, and the peak memory of both
    liger       `long` with Liger's norms, rope and SwiGLU: under PEFT, and under ours

Needed beside PyTorch: transformers, peft, accelerate, and liger-kernel for the last stage.

Run: python benchmarks/gpu.py [--quick] [--shape NAME] [--stages NAME ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from contestants import Step, contestants, stock

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.blocks import blocks
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import base_model, lora_layers
from loralloc.allocation.resize import resize
from loralloc.allocation.supervised import SupervisedLoss
from loralloc.kernels.graphs import GraphedBlocks
from loralloc.kernels.lora import fuse, unfuse
from loralloc.training.replaced import replaced

RANKS = (3, 5, 8, 11, 13, 6, 10, 8, 4, 12)
"""Of the modules in turn, after rounds: 8 in the mean."""


class Bench:
    """The shapes to measure, each built when it is first asked for, one at a time."""

    def __init__(self, shape: str | None, *, quick: bool) -> None:
        is_gpu = torch.cuda.is_available()
        self.large = shape or ("llama2-7b" if is_gpu else "tiny")
        self.small = shape or ("smollm2-135m" if is_gpu else "tiny")
        self.long = (2, 32) if self.large == "tiny" else (4, 1024)
        self.short = (4, 12) if self.large == "tiny" else (16, 72)
        self.repeats = 3 if quick else 7
        self._held: tuple[Any, Any] = (None, None)

    def model(self, shape: str) -> Any:
        """The model of a shape, fused."""
        if self._held[0] != shape:
            self.drop()
            model = shapes.build(shape)
            fuse(model)
            self._held = (shape, model)
        return self._held[1]

    def drop(self) -> None:
        """Give the model's memory back."""
        self._held = (None, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take(self, steps: dict[str, Step]) -> dict[str, Any]:
        """Seconds of every step by turns, and the bytes that each held beyond what was there."""
        seconds = harness.by_turns(steps, repeats=self.repeats, warmup=2)
        return {"seconds": seconds, "bytes": {n: harness.peak_bytes(s) for n, s in steps.items()}}


def over(found: dict[str, Any], above: str, below: str, of: str = "seconds") -> Any:
    """A ratio of two contestants' seconds or bytes; None where a device tells no bytes."""
    if of == "seconds":
        return harness.ratio(found[of][above], found[of][below])
    return found[of][above] / found[of][below] if found[of][below] else None


def equal(bench: Bench) -> dict[str, Any]:
    """Distance of gradients to those of float64, relative, as PEFT has it and as we do."""
    model = shapes.build("tiny", dtype=torch.float32)
    batches = [shapes.batch("tiny", 4, 24, supervised=0.5) for _ in range(4)]
    truth = gradients(copy.deepcopy(model).double(), batches[-1])
    found: dict[str, Any] = {}
    for kind in ("float32", "autocast", "bfloat16"):
        for name in ("peft", "ours", "graphed"):
            each = copy.deepcopy(model)
            if kind == "bfloat16":
                each.to(torch.bfloat16)
            (unfuse if name == "peft" else fuse)(each)
            graphs = nullcontext()
            if name == "graphed" and torch.cuda.is_available():
                graphs = GraphedBlocks(blocks(base_model(each))).on()
            with graphs, autocast() if kind == "autocast" else nullcontext():
                for batch in batches:  # recorded at the second
                    got = gradients(each, batch)
            error = float((got - truth).norm() / truth.norm())
            found.setdefault(kind, {})[name] = error
    return {"relative_error": found}


def gradients(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of everything that trains, in one row."""
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """As TRL has it by default."""
    return torch.autocast(shapes.device().type, dtype)


def launches(bench: Bench) -> dict[str, Any]:
    """Kernels of one block; on a CPU, operators that the profiler names, which are no kernels."""
    model = bench.model(bench.small)
    inner: Any = base_model(model).model
    x = torch.randn(*bench.short, inner.config.hidden_size, device=shapes.device())
    x = x.to(torch.bfloat16).requires_grad_()
    rotary = inner.rotary_emb(x, torch.arange(bench.short[1], device=x.device)[None])

    def step() -> None:
        inner.layers[0](x, position_embeddings=rotary).float().sum().backward()

    def counted() -> int:
        step()
        kind = torch.profiler.ProfilerActivity
        kinds = [kind.CPU, kind.CUDA] if torch.cuda.is_available() else [kind.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            step()
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [e for e in profile.events() if e.device_type == on_gpu]
        return len(events) if torch.cuda.is_available() else len(profile.events())

    found = {"ours": counted()}
    with stock(base_model(model)):
        found["peft"] = counted()
    return {"kernels": found, "ours_over_peft": found["ours"] / found["peft"]}


def long(bench: Bench) -> dict[str, Any]:
    """Long batches, which computing takes all the time of."""
    model = bench.model(bench.large)
    found = bench.take(contestants(model, shapes.batch(bench.large, *bench.long)))
    return {
        **found,
        "ours_over_floor": over(found, "ours", "floor"),
        "ours_over_peft": over(found, "ours", "hf"),
        "memory_ours_over_peft": over(found, "ours", "hf", "bytes"),
    }


def short(bench: Bench, shape: str = "") -> dict[str, Any]:
    """Short batches, which a GPU may wait for the processor in."""
    shape = shape or bench.large
    model, batch = bench.model(shape), shapes.batch(shape, *bench.short, supervised=1 / 3)
    steps = contestants(model, batch)
    found = bench.take(steps)
    found["ours_over_floor"] = over(found, "ours", "floor")
    found["ours_over_peft"] = over(found, "ours", "peft")
    if not torch.cuda.is_available():
        return found
    ours, graphs = steps["ours"], GraphedBlocks(blocks(base_model(model)))

    def graphed() -> None:
        with graphs.on():
            ours()

    try:
        begin = time.perf_counter()
        graphed()
        graphed()  # recorded
        recording_s = time.perf_counter() - begin
        with_graphs = bench.take({"ours": ours, "graphed": graphed})
    finally:
        graphs.remove()
    for kind, measured in with_graphs.items():
        found[kind]["graphed"] = measured["graphed"]
    return {
        **found,
        "recording_s": recording_s,
        "graphed_over_ours": over(with_graphs, "graphed", "ours"),
        "graphed_over_peft": over(found, "graphed", "peft"),
    }


def small(bench: Bench) -> dict[str, Any]:
    """A small model on short batches."""
    return short(bench, bench.small)


def under_graphs(bench: Bench) -> dict[str, Any]:
    """A small model on short batches of one length, under CUDA graphs."""
    model = bench.model(bench.small)
    batch = shapes.batch(bench.small, *bench.short, supervised=1 / 3)
    eager = contestants(model, batch)["ours"]
    compiled: Any = torch.compile(model, mode="reduce-overhead")

    def step() -> None:
        compiled(**batch, use_cache=False).loss.backward()
        for weight in model.parameters():
            weight.grad = None

    begin = time.perf_counter()
    step()
    compile_s = time.perf_counter() - begin
    found = bench.take({"eager": eager, "compiled": step})
    torch.compiler.reset()
    return {
        **found,
        "compile_s": compile_s,
        "eager_over_compiled": over(found, "eager", "compiled"),
    }


def halves(bench: Bench) -> dict[str, Any]:
    """Training steps, the optimiser too, in the half precisions that users train in."""
    result: dict[str, Any] = {}
    batch = shapes.batch(bench.small, *bench.short, supervised=1 / 3)
    names = ("peft", "ours", "graphed") if torch.cuda.is_available() else ("peft", "ours")
    for kind, dtype in (("autocast", torch.bfloat16), ("bfloat16", None), ("fp16", torch.float16)):
        base = torch.bfloat16 if dtype is None else torch.float32
        models = {name: shapes.build(bench.small, dtype=base) for name in names}
        for name in names[1:]:
            fuse(models[name])
        steps = {
            name: training(model, batch, dtype, with_graphs=name == "graphed")
            for name, model in models.items()
        }
        seconds = harness.by_turns(steps, repeats=bench.repeats, warmup=2)
        losses = {name: float(step()) for name, step in steps.items()}
        ratios = {
            f"{name}_over_peft": harness.ratio(seconds[name], seconds["peft"]) for name in names[1:]
        }
        result[kind] = {"seconds": seconds, "losses": losses, **ratios}
    return result


def training(
    model: Any, batch: dict[str, Any], dtype: torch.dtype | None, *, with_graphs: bool
) -> Step:
    """A whole step under autocast to a dtype, with a GradScaler where that is float16."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    kind = shapes.device().type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    graphs = GraphedBlocks(blocks(base_model(model))) if with_graphs else None

    def step() -> Any:
        with (
            torch.autocast(kind, dtype) if dtype else nullcontext(),
            graphs.on() if graphs else nullcontext(),
        ):
            loss = model(**batch, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mixed(bench: Bench) -> dict[str, Any]:
    """What ranks of many sizes cost a step of the large shape."""
    batch = shapes.batch(bench.large, *bench.short, supervised=1 / 3)
    model = bench.model(bench.large)
    ours = contestants(model, batch)["ours"]
    names = list(lora_layers(model))
    changes = {
        "uniform": dict.fromkeys(names, 8),
        "mixed": dict(zip(names, itertools.cycle(RANKS), strict=False)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in changes}
    for _ in range(bench.repeats):
        for name, to in changes.items():
            resize(model, to)
            ours()  # the first step after a change
            seconds[name] += harness.by_turns({name: ours}, repeats=3, warmup=1)[name]
    resize(model, 8)
    ratio = harness.ratio(seconds["mixed"], seconds["uniform"])
    return {"seconds": seconds, "mixed_over_uniform": ratio}


def a_round(bench: Bench) -> dict[str, Any]:
    """Score, plan and resize on 32 examples, over training on as many."""
    model = bench.model(bench.large)
    examples, length = bench.short
    batches = [shapes.batch(bench.large, examples, length, supervised=1 / 3) for _ in range(2)]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    loss = SupervisedLoss(model)
    allocator = Allocator(model, AllocationConfig(seed=0, num_rounds=100), batches)

    def train() -> None:
        for batch in batches:
            loss(batch).mean.backward()
            optimizer.step()
            optimizer.zero_grad()

    parts: dict[str, list[float]] = {}
    module = sys.modules[Allocator.__module__]
    with (
        watched(allocator, "_scores", parts.setdefault("score", [])),
        watched(module, "resize", parts.setdefault("resize", [])),
    ):
        found = bench.take({"training": train, "round": lambda: allocator.step(optimizer)})
    there = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    bench.drop()  # its ranks are others now
    return {
        **found,
        "parts_s": parts,
        "round_over_training": over(found, "round", "training"),
        "memory_round_over_training": (
            (there + found["bytes"]["round"]) / (there + found["bytes"]["training"])
            if there
            else None
        ),
    }


@contextmanager
def watched(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Note the seconds of every call of a function inside."""
    own = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        result, taken = harness.timed(lambda: own(*args, **kwargs))
        seconds.append(taken)
        return result

    with replaced(owner, {name: timed}):
        yield


def liger(bench: Bench) -> dict[str, Any]:
    """The large shape with Liger's parts in the frozen blocks."""
    if not torch.cuda.is_available():
        raise RuntimeError("Liger's kernels need a GPU.")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        model=base_model(bench.model(bench.large)),
        **{"rope": True, "rms_norm": True, "swiglu": True},
        **{"cross_entropy": False, "fused_linear_cross_entropy": False},
    )
    found = long(bench)
    bench.drop()  # its parts stay in that model
    return found


STAGES: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "equal": (equal, 60),
    "launches": (launches, 60),
    "small": (small, 60),
    "halves": (halves, 60),
    "long": (long, 90),
    "short": (short, 60),
    "mixed": (mixed, 90),
    "round": (a_round, 120),
    "liger": (liger, 90),
    "compiled": (under_graphs, 200),
}
"""Each stage and the seconds it may take."""


def main() -> None:
    """Take the stages, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes on one GPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shape", choices=shapes.SHAPES, help="one for all stages")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench, result = Bench(args.shape, quick=args.quick), {"quick": args.quick}
    result["shapes"] = {"large": bench.large, "small": bench.small}
    signal.signal(signal.SIGALRM, _stop)
    for name in args.stages:
        stage, limit = STAGES[name]
        begin = time.perf_counter()
        signal.alarm(limit)
        try:
            found = stage(bench)
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
            bench.drop()
        finally:
            signal.alarm(0)
        result[name] = {**found, "stage_s": time.perf_counter() - begin}
        harness.write(args.json, result)
        figures = {k: v for k, v in result[name].items() if not isinstance(v, (dict, list))}
        sys.stdout.write(f"{name} {figures}\n")
        sys.stdout.flush()


def _stop(*_: Any) -> None:
    raise TimeoutError("the stage took longer than it may")


if __name__ == "__main__":
    main()
