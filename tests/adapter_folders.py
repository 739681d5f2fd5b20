"""Adapter folders of tiny models, with the folders of their backbones."""

import warnings
from pathlib import Path

import tiny
import torch
from peft import PeftModel

from loralloc import resize
from loralloc.allocation.layers import lora_layers


def made(folder: Path, model, *, ranks=None, bias_of_b: float = 0.1, **lora_options) -> Path:
    """Save a backbone and an adapter for it into `folder`; the adapter's is returned."""
    base = folder / "base"
    model.save_pretrained(base)
    model.name_or_path = model.config._name_or_path = str(base)
    adapted = tiny.with_trained_b(tiny.adapted(model, **lora_options), scale=bias_of_b)
    if ranks is not None:
        names = list(lora_layers(adapted))
        resize(adapted, {name: ranks[i % len(ranks)] for i, name in enumerate(names)})
    for name, parameter in adapted.named_parameters():
        if "modules_to_save.default" in name:
            parameter.data += 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def logits(folder: Path, model, ids=None) -> torch.Tensor:
    """What stock PEFT makes of an adapter on a backbone."""
    ids = torch.arange(3, 15)[None] if ids is None else ids
    adapted = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return adapted(input_ids=ids).logits


UNEVEN = (0, 20, 1, 7, 3, 12, 5, 9, 2)
"""Ranks of modules, over and over, so that layers differ."""
