"""A pattern of ranks as an experiment of PEFT's own benchmark (method_comparison/MetaMathQA).

The benchmark trains meta-llama/Llama-3.2-3B on MetaMathQA and tests it on GSM8K. An experiment
there is a folder with `adapter_config.json` and, where it departs from the settings of all,
`training_params.json`. Three commands make one:

    python experiments/peft_benchmark.py rows --output data/metamath
    loralloc search --config data/metamath/search.yaml --output_dir runs/metamath-ranks
    python experiments/peft_benchmark.py folder runs/metamath-ranks --output EXPERIMENTS/lora/NAME

The first asks the Hub for the rows, the second for the backbone, which has to be granted by its
owners and wants a GPU. The third needs neither.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from peft import LoraConfig, TaskType

from loralloc.adapters.pattern import Pattern
from loralloc.runs.search import ANSWER

BACKBONE = "meta-llama/Llama-3.2-3B"
QUESTION = "Question: {query} Think step by step.\nAnswer:"
"""The benchmark's own `query_template`."""

SETTINGS = {
    "model_name_or_path": BACKBONE,
    "dtype": "bfloat16",
    "max_length": 768,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "lora_r": 32,
    "lora_alpha": 64,
}
"""The benchmark's settings in the words of `loralloc search`, with the rank of its LoRA (32)."""

HELD_OUT = 1000


def main() -> None:
    """Write rows, or the folder of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    rows = verbs.add_parser("rows", help="MetaMathQA as prompts and completions, and search.yaml")
    rows.add_argument("--data", help="a JSON Lines file with query and response (default: the Hub)")
    rows.add_argument("--model", default=BACKBONE)
    rows.add_argument("--held-out", type=int, default=HELD_OUT)
    rows.add_argument("--output", type=Path, required=True)
    rows.set_defaults(run=lambda a: write_rows(read(a.data), a.output, a.model, a.held_out))
    folder = verbs.add_parser("folder", help="the experiment, from what `loralloc search` wrote")
    folder.add_argument("search", type=Path)
    folder.add_argument("--output", type=Path, required=True)
    folder.add_argument("--learning_rate", type=float, help="another than the benchmark's 1e-4")
    folder.add_argument("--model", help="another backbone than the benchmark's")
    folder.set_defaults(run=lambda a: write_folder(a.search, a.output, a.learning_rate, a.model))
    args = parser.parse_args()
    args.run(args)


def read(data: str | None) -> Iterable[Mapping[str, str]]:
    """Rows with a query and a response."""
    from datasets import load_dataset

    if data is None:
        return load_dataset("meta-math/MetaMathQA", split="train")
    return load_dataset("json", data_files=data, split="train")


def write_rows(rows: Iterable[Mapping[str, str]], folder: Path, model: str, held_out: int) -> None:
    """Rows as `loralloc` reads them, the first held out, and the settings of a search."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "dev.jsonl").open("w") as dev, (folder / "train.jsonl").open("w") as train:
        for number, row in enumerate(rows):
            prompt = QUESTION.format(query=row["query"])
            line = json.dumps({"prompt": prompt, "completion": " " + row["response"]})
            (dev if number < held_out else train).write(line + "\n")
    settings = {**SETTINGS, "model_name_or_path": model, "dataset_name": str(folder)}
    (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def write_folder(
    search: Path, folder: Path, learning_rate: float | None, model: str | None
) -> None:
    """The experiment's two files; the second only where something departs from the benchmark."""
    if folder.exists():
        sys.exit(f"{folder} is there already; name another `--output`.")
    if not (search / ANSWER).is_file():
        sys.exit(f"{search} holds no {ANSWER}; name what `loralloc search` wrote.")
    answer = json.loads((search / ANSWER).read_text())
    pattern = Pattern(ranks=answer["ranks"], scaling=answer["scaling"])
    LoraConfig(**pattern.peft_options(), task_type=TaskType.CAUSAL_LM).save_pretrained(folder)
    settings = {}
    if model is not None:
        settings["model_id"] = model
    if learning_rate is not None:
        settings["optimizer_kwargs"] = {"lr": learning_rate, "weight_decay": 0.1}
    if settings:
        (folder / "training_params.json").write_text(json.dumps(settings, indent=2) + "\n")
    sys.stdout.write(f"{folder}: {sum(pattern.ranks.values())} ranks, {answer['sentence']}\n")


if __name__ == "__main__":
    main()
