"""Every recipe of docs/recipes, run as it is printed against the package it is for."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from loralloc.allocation.layers import adapted_part
from loralloc.allocation.objective import full_precision
from loralloc.allocation.record import Record
from loralloc.methods.restore import saved_ranks

PAGES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
LLAMA, BERT = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
NEEDS = {
    "sentence-transformers": "sentence_transformers",
    "Lightning": "lightning",
    "Optuna": "optuna",
    "Ray Train": "ray",
}
"""Packages that the tests may be without."""

UNTRIED = "others.md"
"""The page whose recipes no test runs, as its first line says."""

SLOW = ("Ray Train", "Optuna")

RARE = ("eval_packing", "padding_free")

BACKBONES = {
    "Reward models": lambda: AutoModelForSequenceClassification.from_pretrained(
        LLAMA, num_labels=1, dtype=torch.float32
    ),
    "transformers.Trainer": lambda: AutoModelForSequenceClassification.from_pretrained(
        BERT, num_labels=2
    ),
    "sentence-transformers": lambda: AutoModel.from_pretrained(BERT),
}
"""What the adapters are opened on; the others are on the language model."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

NUM_ROWS = 24

pytestmark = [
    pytest.mark.filterwarnings(rf"ignore::{kind}")  # of other packages, and not ours to mend
    for kind in ("UserWarning", "FutureWarning", "DeprecationWarning", "ResourceWarning")
]


def recipes() -> dict[str, str]:
    """The script under each heading, with what its page begins with."""
    found = {}
    for page in sorted(PAGES.glob("*.md")):
        if page.name == UNTRIED:
            continue
        first, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        shared = code_of(first)
        for section in sections:
            heading, _, body = section.partition("\n")
            if code := code_of(body):
                found[heading] = shared + code
    return found


def code_of(text: str) -> str:
    return "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def variants() -> list[str]:
    """The options of `SFTConfig` in the table of the page on TRL."""
    return re.findall(r"^\| `(.*?=.*?)` \|", (PAGES / "trl.md").read_text("utf-8"), re.MULTILINE)


def row(number: int) -> dict[str, dict]:
    """A row of each data set that the recipes name."""
    film, verdict = f"the film {number} is", (" bad and cold", " good and warm")[number % 2]
    other = (" good and warm", " bad and cold")[number % 2]
    turns = (("user", film), ("assistant", verdict.strip()))
    return {
        "texts": {"text": film + verdict},
        "chats": {"messages": [{"role": role, "content": text} for role, text in turns]},
        "pairs": {"prompt": film, "chosen": verdict, "rejected": other},
        "marked": {"prompt": film, "completion": verdict, "label": number % 3 > 0},
        "prompts": {"prompt": film},
        "reviews": {"text": "the film is" + verdict, "label": number % 2},
        "questions": {"anchor": "the story is" + verdict, "positive": "a place is" + verdict},
    }


@pytest.fixture
def desk(llama_folder, bert_folder, write_rows, tmp_path, monkeypatch):
    """A folder with small models and data in the places of those that recipes name."""
    for name, folder in ((LLAMA, llama_folder), (BERT, bert_folder)):
        shutil.copytree(folder, tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / LLAMA)
    rows = [row(number) for number in range(NUM_ROWS)]
    for name in rows[0]:
        few = 8 if name == "prompts" else NUM_ROWS  # each of them is written to four times
        write_rows(tmp_path / f"{name}.jsonl", [of[name] for of in rows[:few]])
        write_rows(tmp_path / f"{name}-dev.jsonl", [of[name] for of in rows[: NUM_ROWS // 2]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in recipes()],
)
def test_a_recipe_trains_an_adapter_whose_ranks_moved_and_that_stock_peft_opens(name, desk):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    scope = {"__name__": "recipe"}
    exec(recipes()[name], scope)
    check_adapter(name, scope)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(text, marks=[pytest.mark.slow] if any(s in text for s in RARE) else [])
        for text in variants()
    ],
)
def test_the_recipe_for_sft_has_the_options_of_its_table(options, desk):
    code, rate = recipes()["SFT"], "        learning_rate=2e-4,\n"
    assert rate in code
    short = ", max_length=48" if "packing" in options else ""  # rows enough for three epochs
    scope = {"__name__": "recipe"}
    exec(code.replace(rate, f"{rate}        {options}{short},\n"), scope)
    check_adapter("SFT", scope)


def check_adapter(name: str, scope: dict) -> None:
    record = Record.load("adapter")
    assert record.rounds and len(set(record.ranks.values())) > 1
    assert saved_ranks("adapter") == {module: r for module, r in record.ranks.items() if r}
    backbone = BACKBONES.get(
        name, lambda: AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    )
    opened = PeftModel.from_pretrained(backbone(), "adapter").eval()
    trained = trained_model(scope)
    if trained is not None:
        tokens = torch.arange(5, 13).unsqueeze(0)
        with full_precision(trained), torch.no_grad():  # TRL's trainers leave it in bfloat16
            found, expected = opened(input_ids=tokens)[0], trained(input_ids=tokens)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def trained_model(scope: dict):
    """What a recipe trained, where it is left in its names."""
    for owner in (scope.get("model"), getattr(scope.get("trainer"), "model", None)):
        if owner is not None and getattr(adapted_part(owner), "peft_config", None):
            return adapted_part(owner).eval()
    return None


def test_optional_packages_are_those_of_recipes():
    assert set(NEEDS) | set(SLOW) | set(BACKBONES) <= set(recipes())
    assert len(variants()) == 5
    assert "No test runs these" in (PAGES / UNTRIED).read_text("utf-8").splitlines()[2]
