"""Real servers on a CPU: what each writes greedily, and the largest log-probabilities it tells.

An answer is a list of steps: the token written, and the log-probabilities of the likeliest tokens.
vLLM and MLX-LM run in Pythons of their own, which need not have loralloc.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from loralloc.runs.models import BUILT_IN

Step = tuple[int, Mapping[int, float]]
Answer = list[Step]

READY_S = 300
NUM_LIKELIEST = 5
MAX_RANK = 32
ALONE = "backbone alone"
"""What the answers without an adapter are called."""


def llama_cpp(
    backbone: Path, loras: Mapping[str, Path], prompts: Sequence[str], tokens: int
) -> dict[str, list[Answer]]:
    """A GGUF backbone with each LoRA in turn, and without; nothing in it is in 16 bits."""
    import xllamacpp

    answers = {}
    for name, lora in {ALONE: None, **loras}.items():
        params = xllamacpp.CommonParams()
        params.model.path = str(backbone)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)] if lora else []
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.warmup, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(params)
        asked = {"max_tokens": tokens, "temperature": 0, "top_k": 1, "n_probs": NUM_LIKELIEST}
        answers[name] = [
            _steps(server.handle_completions({"prompt": prompt, **asked})) for prompt in prompts
        ]
        del server
    return answers


def vllm(
    python: str, model: Path, adapters: Mapping[str, Path], prompts: Sequence[str], tokens: int
) -> dict[str, list[Answer]]:
    """The HTTP server of vLLM, with every adapter by its name, and without."""
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    words += ["--served-model-name", ALONE, "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "256", "--max-num-seqs", "1"]
    if adapters:
        named = [f"{name}={path}" for name, path in adapters.items()]
        words += ["--enable-lora", "--max-lora-rank", str(MAX_RANK), "--lora-modules", *named]
    asked = {"max_tokens": tokens, "temperature": 0, "logprobs": NUM_LIKELIEST}
    asked["return_tokens_as_token_ids"] = True
    answers = {}
    with running(words, model.with_name("vllm.log"), VLLM_CPU_KVCACHE_SPACE="1") as address:
        for name in [ALONE, *adapters]:
            said = [
                post(address + "/v1/completions", {"model": name, "prompt": p, **asked})
                for p in prompts
            ]
            answers[name] = [_vllm_steps(answer) for answer in said]
    return answers


def mlx(
    python: str, model: Path, adapters: Mapping[str, Path], prompts: Sequence[str], tokens: int
) -> dict[str, list[Answer]]:
    """The HTTP server of MLX-LM, with each adapter in turn, and without."""
    asked = {"model": "default_model", "max_tokens": tokens, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": NUM_LIKELIEST}
    answers = {}
    for name, path in {ALONE: None, **adapters}.items():
        words = [python, "-m", "mlx_lm", "server", "--model", str(model)]
        words += ["--adapter-path", str(path)] if path else []
        with running(words, model.with_name("mlx.log")) as address:
            answers[name] = [
                _steps(post(address + "/v1/completions", {"prompt": prompt, **asked}))
                for prompt in prompts
            ]
    return answers


def transformers_serve(
    model: Path, conversations: Sequence[list[dict[str, str]]], tokens: int
) -> list[str]:
    """`transformers serve`, which answers conversations."""
    words = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    words += ["--device", "cpu", "--dtype", "float32"]
    asked = {"model": str(model), "max_tokens": tokens, "temperature": 0}
    with running(words, model.with_name("transformers.log")) as address:
        said = [
            post(address + "/v1/chat/completions", {"messages": messages, **asked})
            for messages in conversations
        ]
    return [str(answer["choices"][0]["message"]["content"]) for answer in said]


@contextmanager
def running(words: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """A server's address, once it answers; the server ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
    try:
        end = time.monotonic() + READY_S
        while not _is_up(address):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def post(address: str, body: Mapping[str, Any]) -> Any:
    """What a server answers."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=READY_S) as response:
        return json.load(response)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health") as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def _steps(answer: Any) -> Answer:
    """Of llama.cpp and MLX-LM; the token written is the likeliest."""
    found = []
    for step in answer["choices"][0]["logprobs"]["content"]:
        likeliest = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
        found.append((max(likeliest, key=lambda token: likeliest[token]), likeliest))
    return found


def _vllm_steps(answer: Any) -> Answer:
    said = answer["choices"][0]["logprobs"]
    return [
        (_vllm_token(token), {_vllm_token(key): value for key, value in likeliest.items()})
        for token, likeliest in zip(said["tokens"], said["top_logprobs"], strict=True)
    ]


def _vllm_token(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def write_gguf_backbone(name: str, path: Path) -> None:
    """A built-in backbone's GGUF with the weights that Transformers has: without quantisation."""
    carrier = BUILT_IN[name]
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
