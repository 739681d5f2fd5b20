"""`loralloc methods`: the ways to adapt a model, and what each costs."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from loralloc.cli.console import Console, tables_that_fit

if TYPE_CHECKING:
    from loralloc.methods.method import Method

PAPERS_MODEL = "LLaMA-2-7B"
"""Whose shape is taken where no model is named: the paper's, which needs no download."""

COLUMNS = (
    *("method", "algorithm", "begins", "settings", "merges", "size"),
    *("rate", "parameters", "over", "paper"),
)
NUM_TEXTS = 6
"""How many of them are texts."""

NOTE = """
Size and parameters are those nearest to the budget, `over` how far from it; `paper` is the paper's
comparison (`--paper`). The algorithm is faithful, a port to other backbones or a reconstruction;
its initialisation and its settings are as published or ours; `rate` is the learning rate it wants.
A method by name: loralloc train --method NAME [--budget N | --paper] [--protocol tuned] ..."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "methods",
        help="list the ways to adapt a model",
        description=(
            "List every method of the paper's tables, its later competitors and the controls: "
            "where each comes from, how near it is to its paper, whether it merges, and its size "
            "and parameters for a model at one budget."
        ),
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"smollm2-135m, minilm-l6, a folder or a Hub name (default: {PAPERS_MODEL}'s shape)",
    )
    parser.add_argument(
        "--budget", type=int, metavar="N", help="parameters (default: LoRA's with rank 8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from rich.text import Text

    from loralloc.cli.progress import prepare_process

    prepare_process()
    from loralloc.methods.catalog import METHODS, get_method
    from loralloc.methods.peft_method import default_budget
    from loralloc.runs.models import empty_model

    if args.budget is not None and args.budget < 1:
        raise ValueError(f"`--budget` is {args.budget}; it must be at least 1.")
    model = papers_shape() if args.model is None else empty_model(args.model)
    budget = default_budget(model) if args.budget is None else args.budget
    rows = [facts(get_method(name), model, budget) for name in METHODS]
    out = Console()
    if args.json:
        out.print_json(data={"model": args.model or PAPERS_MODEL, "budget": budget, "rows": rows})
        return 0
    cells = [
        (
            row["name"],
            row["status"],
            row["initialisation"] or "-",
            row["settings"] or "-",
            "yes" if row["merges"] else "no",
            _size(row),
            "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "-" if row["over_budget"] is None else f"{row['over_budget']:+.1%}",
            "-" if row["paper_parameters"] is None else f"{row['paper_parameters']:,}",
        )
        for row in rows
    ]
    title = f"{args.model or PAPERS_MODEL}, a budget of {budget:,} parameters"
    for table in tables_that_fit(title, COLUMNS, cells, width=out.width, texts=NUM_TEXTS):
        out.print(table)
        out.print()
    out.print("Where they come from, and what differs")
    for row in rows:
        rate = f"Rate: {row['rate_from']}. " if row["rate_from"] else ""
        words = f"{row['paper']}. {rate}{row['differs']}".strip()
        out.print(Text.assemble((row["name"], "bold"), ": ", (words, "dim")))
    out.print(textwrap.dedent(NOTE), highlight=False, soft_wrap=True)
    return 0


def facts(kind: type[Method], model: Any, budget: int) -> dict[str, Any]:
    """What there is to know of a method, for a backbone and a budget."""
    about = kind.about
    method = kind()
    too_large = ""
    parameters = None
    try:
        method.fit(model, budget)
        parameters = method.count(model, method.chosen_size())
    except ValueError as error:
        too_large = str(error)
    return {
        "name": about.name,
        "title": about.title,
        "paper": about.paper,
        "status": about.status,
        "initialisation": about.initialisation,
        "settings": about.settings,
        "learning_rate": about.learning_rate,
        "rate_from": about.rate_from,
        "differs": about.differs,
        "merges": about.merges,
        "size_name": method.size,
        "size": None if too_large else method.chosen_size(),
        "parameters": parameters,
        "over_budget": None if parameters is None or not method.size else parameters / budget - 1,
        "too_large": too_large or None,
        "paper_settings": dict(kind.paper),
        "paper_parameters": papers_count(kind, model),
    }


def papers_count(kind: type[Method], model: Any) -> int | None:
    """Parameters of the paper's settings; None where there are none, or they do not fit."""
    if not kind.paper:
        return None
    method = kind(**kind.paper)
    try:
        return method.count(model, method.chosen_size())
    except ValueError:  # fewer blocks than the paper's settings have prompts for
        return None


def _size(row: dict[str, Any]) -> str:
    if row["too_large"]:
        return "beyond it" if row["size_name"] else "its file's"
    return f"{row['size_name']} {row['size']}" if row["size_name"] else "one only"


def papers_shape() -> Any:
    """LLaMA-2-7B without its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)
