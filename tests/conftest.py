"""What every test shares: no network, tiny model folders with their tokenizers on disk, `--quick`.

Being here puts this folder on the import path: tests say `import tiny` and `import reference`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow each other down

import gc
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, and no limit of time for one: machines differ.
settings.register_profile("loralloc", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("quick", settings.get_profile("loralloc"), max_examples=20)
settings.load_profile("loralloc")

LONG = (
    *("cli", "evaluation/judge", "invariant", "processes", "recipes", "runs", "training"),
    *("allocation/test_ablation.py", "allocation/test_many_rounds.py"),
    *("allocation/test_replicas.py", "allocation/test_screened.py"),
    *("evaluation/test_evaluate.py", "evaluation/test_metrics_answers.py"),
    *("experiments/test_ray.py", "experiments/test_statistics.py"),
    *("experiments/test_study_scripts.py", "experiments/test_sweep.py", "experiments/test_work.py"),
    *("kernels/test_graphs.py", "kernels/test_lora_fallbacks.py", "kernels/test_packed.py"),
    *("methods/test_adalora.py", "methods/test_learned_adapter.py", "methods/test_lst.py"),
    *("methods/test_salora.py", "methods/test_shrink.py", "methods/test_sora.py"),
    *("methods/test_ssp.py", "report/test_page.py", "report/test_picture.py"),
    *("test_docs.py", "test_pages.py"),
)
"""What `--quick` leaves out: tests that train with a Trainer or start processes, and others whose
first cases take over 1.5 seconds. `--durations=10` tells what belongs here."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SENTENCES = (
    "the film is good and warm",
    "the film is bad and cold",
    "a good story of a warm place",
    "a bad story of a cold place",
    "the place is warm",
    "the story is good",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-quick` asks for."""
    parser.addoption("--quick", action="store_true", help="the first case of short tests")


def pytest_configure(config: pytest.Config) -> None:
    """With `--quick`, try fewer examples of a property."""
    if config.getoption("--quick"):
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick`, leave out what is long."""
    if not config.getoption("--quick"):
        return None
    long = {Path(__file__).parent / name for name in LONG}
    if gone := [str(path) for path in long if not path.exists()]:
        raise pytest.UsageError(f"LONG in tests/conftest.py names {', '.join(gone)}: not there.")
    return collection_path in long or None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--quick`, keep the first case of every test, of those that `-m` has left."""
    if not config.getoption("--quick"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = first.values()


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every garbage collection to come.

    Each `Trainer.train` collects twice: half its time would go into millions of such objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A Llama of 2 blocks and width 32 with a byte-level tokenizer, as `save_pretrained` has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A BERT of 2 blocks and width 32 with a word-level tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = _word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows() -> Callable[[Path, Iterable[Mapping]], Path]:
    """Write rows as JSON Lines."""

    def write(path: Path, rows: Iterable[Mapping]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def _byte_tokenizer():
    """One token a byte, but for the commonest words: nothing is unknown, and texts are short."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _word_tokenizer():
    """One token a word of `SENTENCES`, between [CLS] and [SEP] as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
