"""EVA (Paischer et al. 2024), by PEFT: A spans where a layer's inputs vary most."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import EvaConfig, get_eva_state_dict
from torch import Tensor

from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, weight_a
from loralloc.allocation.objective import Batch
from loralloc.allocation.resize import resize
from loralloc.allocation.supervised import IGNORED
from loralloc.methods.from_data import LoraFromData
from loralloc.methods.method import About
from loralloc.methods.restore import KEY_PREFIX
from loralloc.methods.session import Session

MOST_PASSES = 200
"""Passes over the examples after which their components are taken to settle no more."""


@dataclass(kw_only=True)
class Eva(LoraFromData):
    """A is the first right singular vectors of the layer's inputs, and B zero at the start.

    The components of all layers stand in one list by their shares of their layer's variance, and
    the first r M of it are the ranks, with r ranks on average, M layers and at most rho r for each.
    PEFT computes them; the adapter is plain LoRA from then on.
    """

    examples: int = 1024
    """Training examples at most; it stops where components have settled."""

    rho: float = 2.0
    """Ranks of a layer at most, over `rank`; 1 gives every layer as many. Source: PEFT."""

    tau: float = 0.99
    """Cosine of a component before and after a batch from which on it has settled. Source: PEFT."""

    about: ClassVar[About] = About(
        name="eva",
        title="EVA",
        paper="Paischer et al. 2024",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is after the start",
        differs="The scaling is LoRA's, far above the authors' of 1/16. The budget is in ranks, "
        "as published: it equals LoRA's in ranks, and in parameters only where modules are of one "
        "size.",
        merges=True,
    )

    def bears_scaled_loss(self) -> bool:
        """See `Method.bears_scaled_loss`."""
        return True

    def start(self, session: Session, batches: Sequence[Batch]) -> None:
        """See `LoraFromData.start`.

        Raises:
            ValueError: The batches are too small, or their components do not settle.
        """
        components = self._components(batches)
        ranks = {name: len(rows) for name, rows in components.items()}
        resize(self.model, ranks, optimizer=session.optimizer)
        for name, layer in lora_layers(self.model).items():
            weight = weight_a(layer)
            weight.data.copy_(components[name])

    def _components(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """By module, its rows of A: shape (num_ranks, in_features)."""
        assert self.rank is not None, "fit() chooses it"
        most = round(self.rho * self.rank)
        # A label for each token says which tokens count, unless it leaves too few; one for each
        # text says nothing of them.
        by_label = all(batch["labels"].ndim > 1 for batch in batches if "labels" in batch)
        by_label = by_label and any(_num_tokens(b, by_label=True) >= most for b in batches)
        usable = [dict(b) for b in batches if _num_tokens(b, by_label=by_label) >= most]
        if not usable:
            raise ValueError(
                f"eva takes up to {most} components of a layer from every batch, and none has as "
                "many tokens; raise `per_device_train_batch_size`, or lower `rho` or the rank."
            )
        config = copy.copy(self.model.peft_config["default"])
        config.eva_config = EvaConfig(rho=self.rho, tau=self.tau, use_label_mask=by_label)
        left = MOST_PASSES * len(usable)

        def forward(model: Any, inputs: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise ValueError(
                    f"The components of eva have not settled after {MOST_PASSES} passes over "
                    f"{len(usable)} batches; lower `tau` or raise `examples`."
                )
            model(**inputs)

        found = get_eva_state_dict(
            self.model,
            usable,
            config,
            forward_fn=forward,
            gather_distributed_inputs=False,  # the batches are the same in all processes
            show_progress_bar=False,
        )
        return replicas.agreed({name.removeprefix(KEY_PREFIX): x for name, x in found.items()})


def _num_tokens(batch: Batch, *, by_label: bool) -> int:
    """Tokens of a batch that count."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if by_label and "labels" in batch:
        mask = mask & (batch["labels"] != IGNORED)
    return int(mask.sum())
