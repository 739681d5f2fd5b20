"""What a stranger's `adapter_config.json` may ask of PEFT: checked before PEFT reads it.

PEFT makes what a configuration says, imports what it names and matches its regular expressions with
every module's name. So sizes are held to those that models have, code is refused, and expressions
are tried in a process that is ended when they take too long.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from loralloc.allocation.files import is_number

MOST = 2**16
"""Of a rank, or of prompts' tokens, layers and widths: no model has more."""

SIZES = (
    *("r", "init_r", "target_r", "num_virtual_tokens", "num_layers", "token_dim"),
    *("encoder_hidden_size", "encoder_num_layers", "num_attention_heads", "adapter_len"),
    *("num_transformer_submodules", "adapter_layers", "bottleneck_size"),
)
"""Options by which PEFT takes memory."""

CODE = ("megatron_config",)
"""Options by which PEFT imports what a configuration names."""

EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")
"""Options that are regular expressions where they are a text."""

KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(EXPRESSIONS, lambda value: isinstance(value, str) or _all_are(value, str)),
    "layers_to_transform": lambda value: isinstance(value, int) or _all_are(value, int),
    "modules_to_save": lambda value: _all_are(value, str),
    "target_parameters": lambda value: _all_are(value, str),
}
"""What options are by which PEFT finds modules."""

PATTERNS = ("rank_pattern", "alpha_pattern")
"""Options whose keys are regular expressions."""

LONGEST = 20_000
"""Characters of an expression."""

MOST_S = 10.0
"""For all expressions and all names; those that people write take milliseconds."""

_TRIED = """
import json, re, sys
keys, names = json.load(sys.stdin)
for key in keys:
    for form in (key, rf"(.*\\.)?({key})$"):
        for name in names:
            re.match(form, name), re.fullmatch(form, name)
"""


def check_config(config: Mapping[str, Any], names: Sequence[str], *, where: str) -> None:
    """Refuse what PEFT should not read.

    Args:
        config: The content of `adapter_config.json`.
        names: Of the modules that its expressions will be matched with.
        where: What the sentence calls it.

    Raises:
        ValueError: Naming the option.
    """
    for option in SIZES:
        value = config.get(option)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
            raise ValueError(
                f"`{option}` of {where} is {value!r:.60}; it must be a whole number up to {MOST:,}."
            )
    if config.get("peft_type") == "LORA" and not config.get("r", 8):  # scalings are alpha / r
        raise ValueError(
            f"`r` of {where} is {config['r']!r}; it must be a whole number from 1 to {MOST:,}."
        )
    for option, fits in KINDS.items():
        value = config.get(option)
        if value is not None and not fits(value):
            raise ValueError(f"`{option}` of {where} is {value!r:.60}, which is none to PEFT.")
    for option in CODE:
        if config.get(option):
            raise ValueError(
                f"`{option}` of {where} lets PEFT import what it names, which a file that may come "
                "from anybody is not trusted with; remove the option."
            )
    expressions = [config[name] for name in EXPRESSIONS if isinstance(config.get(name), str)]
    for option in PATTERNS:
        value = config.get(option) or {}
        if not isinstance(value, dict):
            raise ValueError(
                f"`{option}` of {where} is a {type(value).__name__}; it must be an object."
            )
        for key, number in value.items():
            fits = _is_rank if option == "rank_pattern" else is_number
            if not fits(number) and not (_is_of_triplets(config) and _all_are(number, bool)):
                raise ValueError(f"`{option}` of {where} gives {key!r:.60} {number!r:.60}.")
        expressions += value
    if not is_number(config.get("lora_alpha", 8)):
        raise ValueError(
            f"`lora_alpha` of {where} is {config['lora_alpha']!r:.60}; it must be a number."
        )
    check_quick(expressions, names, where=where)


def check_quick(expressions: Iterable[str], names: Sequence[str], *, where: str) -> None:
    """Refuse regular expressions that are none, or that take for ever.

    Args:
        expressions: As PEFT matches them, whole or as the end of a name.
        names: What they are matched with.
        where: What the sentence calls the file.

    Raises:
        ValueError: Naming one, where one is wrong.
    """
    slow = []
    for key in expressions:
        try:
            if len(key) > LONGEST:
                raise re.error(f"it has {len(key):,} characters, and may have {LONGEST:,}")
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of what Python will read in another way
                re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError, Warning) as error:
            raise ValueError(
                f"{key!r:.60} in {where} is no regular expression ({error})."
            ) from None
        # Where at most one thing repeats, and nothing is in brackets, a name is soon gone through.
        signs = re.sub(r"\\.", "", key)
        if len(found := re.findall(r"[*+{]", signs)) > 1 or (found and re.search(r"[(|]", signs)):
            slow.append(key)
    if slow and (fault := _fault_of(tuple(slow), tuple(names))):
        raise ValueError(
            f"The regular expressions of {where} {fault}, beginning with {slow[0]!r:.60}; name the "
            "modules instead."
        )


def _fault_of(expressions: Sequence[str], names: Sequence[str]) -> str:
    """What is wrong with expressions, tried in a process that can be ended; empty if nothing."""
    try:
        subprocess.run(
            [sys.executable, "-S", "-E", "-c", _TRIED],
            input=json.dumps([expressions, names]),
            text=True,
            check=True,
            capture_output=True,
            timeout=MOST_S,
        )
    except subprocess.TimeoutExpired:
        return f"take over {MOST_S:g} s to match"
    except subprocess.SubprocessError:
        return "cannot be matched"
    return ""


def check_fits(model: nn.Module, config: Any, weights: Any, *, where: str) -> None:
    """Refuse an adapter of LoRA that would take more memory than its file holds numbers.

    Args:
        model: The backbone.
        config: The adapter's `LoraConfig`, whose expressions have been checked.
        weights: The path of its tensors, of which the header alone is read.
        where: What the sentence calls the adapter.

    Raises:
        ValueError: A tensor does not fit the backbone's module, or PEFT would make more than there
            is to load.
    """
    with safe_open(weights, framework="pt") as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    held = sum(math.prod(shape) for shape in shapes.values())
    wanted = 0
    for name, module in model.named_modules():
        width = _widths(module)
        if width is None or not check_target_module_exists(config, name):
            continue
        patterns = config.rank_pattern
        rank = patterns.get(get_pattern_key(patterns, name), config.r)
        wanted += rank * sum(width)
        for which, side, at in (("A", width[0], 1), ("B", width[1], 0)):
            shape = shapes.get(f"base_model.model.{name}.lora_{which}.weight")
            if shape is not None and len(shape) == 2 and shape[at] != side:
                raise ValueError(
                    f"lora_{which} of {name} in {where} is of shape {tuple(shape)}, and the "
                    f"model's module takes {side}; use the model that it was trained with."
                )
    if wanted > held:
        raise ValueError(
            f"The configuration in {where} asks for {wanted:,} numbers of LoRA on this model, and "
            f"its weights have {held:,}; use the model that it was trained with."
        )


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output of a linear layer, whatever class it is of; None of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's
        shape: Any = module.weight.shape
        return int(shape[0]), int(shape[1])
    return None


def _all_are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_of_triplets(config: Mapping[str, Any]) -> bool:
    """Whether it is AdaLoRA's, whose pattern says of every triplet whether it stayed."""
    return config.get("peft_type") == "ADALORA"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
