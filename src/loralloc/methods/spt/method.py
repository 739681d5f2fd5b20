"""SPT, prompts made from what is read, at layers that are searched for (Zhu & Tan 2023)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from loralloc.allocation import replicas
from loralloc.allocation.blocks import blocks, hidden_size
from loralloc.allocation.objective import Batch
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import About
from loralloc.methods.optimizer import train_what_is_left
from loralloc.methods.session import Session
from loralloc.methods.spt.generator import PromptGenerator, mix
from loralloc.methods.spt.search import LayerSearch
from loralloc.methods.spt.slots import PromptSlots, Writer

GENERATOR = "prompt_generator"
"""The name under which a block holds what makes the prompts that it reads."""

NUM_LAYERS = 8
"""Layers with a generator at the end; Table 1's count of LLaMA-2-7B, 8 of 32 blocks."""


@dataclass(kw_only=True)
class Spt(InPlaceMethod):
    """l prompts in front of the text, made anew before some blocks from the instruction so far.

    Before the first block they are a soft prompt p_0, which is learned; before block i, 0 < i < L,

        P_i = W_up relu(W_down Pool_l(H_i))        p_i = (1 - tau a_i) p_{i-1} + tau a_i P_i

    with H_i the hidden states of the instruction, averaged adaptively to l of them (the mean and
    W_down, which has no bias, may change places). While it searches there is a generator P_i
    before every block but the first, and the gates a_i are learned (`LayerSearch`). Then K of
    them stay, those with the largest gates; all weights are drawn anew, and a_i = tau = 1.

    Its parameters are those of K generators (Table 1 counts these alone) and of the soft prompt.
    """

    bottleneck: int | None = None
    """Size m between W_down and W_up; None for what the budget allows."""

    prompt_length: int = 10
    """Prompts l; they cost attention, but hardly any parameters."""

    num_layers: int | None = None
    """Generators K at the end; None for 8, or for a quarter of the blocks where that is less."""

    layers: Sequence[int] | None = None
    """Blocks, counted from 0, before which prompts are made (SPT-fixed); None to search for them,
    or to space them evenly where there is no search."""

    search: bool = True
    """Whether the layers are searched for, where they are not given."""

    search_share: float = 0.25
    """Steps that search, on top of the run's, as a share of these; above 0 and at most 1."""

    tau: float = 1.0
    """How far a gate of 1 lets new prompts replace the old while searching, in (0, 1]."""

    consistency: float = 1.0
    """Weight of the sub-networks' distance in the gates' loss; 0 leaves them out."""

    about: ClassVar[About] = About(
        name="spt",
        title="SPT",
        paper="Zhu & Tan 2023",
        status="reconstruction",
        initialisation="ours",
        settings="ours",
        learning_rate=5e-4,
        rate_from="late prompt tuning's runs; no code was published",
        differs="No code was published: the generator is late prompt tuning's, the gates are "
        "compared as in S3Delta, optimised to first order, and sub-networks drop half of them. The "
        "first block always reads the soft prompt.",
        starts_as_base=False,
        why_not_base="The prompts take a share of the attention before they have learned what to "
        "say.",
        shares_prompts=False,
    )
    size: ClassVar[str] = "bottleneck"
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 256, "num_layers": NUM_LAYERS}

    _search: LayerSearch | None = field(default=None, init=False, repr=False, compare=False)
    _search_steps: int = field(default=0, init=False, repr=False, compare=False)
    _session: Session | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise ValueError(f"`prompt_length` is {self.prompt_length}; it must be at least 1.")
        if not 0 < self.tau <= 1:
            raise ValueError(f"`tau` is {self.tau}; it must be above 0 and at most 1.")
        if not 0 < self.search_share <= 1:
            raise ValueError(
                f"`search_share` is {self.search_share}; it must be above 0 and at most 1, and "
                "`search` of false does without."
            )
        if self.consistency < 0:
            raise ValueError(f"`consistency` is {self.consistency}; it must be at least 0.")
        if self.layers is not None and self.num_layers is not None:
            raise ValueError("`layers` names the layers and `num_layers` counts them; give one.")
        if self.layers is not None:
            self.layers = sorted(set(self.layers))

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        width = hidden_size(model)
        return self._num_layers(model) * 2 * width * size + self.prompt_length * width

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        assert self.bottleneck is not None, "fit() chooses it"
        candidates = list(range(1, len(blocks(model))))
        count = self._num_layers(model)
        self._generators: dict[int, PromptGenerator] = {}
        self._slots = PromptSlots(model, self.prompt_length, writers=self._writers)
        if self._is_searched:
            self._search = LayerSearch(candidates, tau=self.tau, consistency=self.consistency)
            chosen = candidates
        else:
            self._search = None
            chosen = evenly_spaced(candidates, count) if self.layers is None else [*self.layers]
        for index in chosen:
            block = blocks(model)[index]
            generator = PromptGenerator(hidden_size(model), self.bottleneck)
            block.add_module(GENERATOR, generator.to(next(block.parameters()).device))
            self._generators[index] = generator

    def watch(self, batch: Batch) -> None:
        """See `Method.watch`."""
        self._slots.watch(batch)

    def search_steps(self, num_steps: int) -> int:
        """See `Method.search_steps`."""
        return max(1, round(self.search_share * num_steps)) if self._is_searched else 0

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        self._session = session
        self._search_steps = session.search_steps

    def step(self, number: int) -> None:
        """See `Method.step`."""
        if self._search is None:
            return
        assert self._session is not None, "begin() comes first"
        self._search.update(self.model, self._session)
        if number >= self._search_steps:
            self._keep(self._search.best(self._num_layers(self.model)))
            self._draw_anew()

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return self._search_steps

    def finish(self) -> None:
        """See `Method.finish`."""
        if self._search is not None:
            raise RuntimeError(
                f"The run ended while {self.about.title} was still searching for its layers; let "
                "it take the steps it was planned to take, or give `layers`."
            )

    def structure(self) -> dict[str, Any]:
        """See `InPlaceMethod.structure`."""
        return {"layers": None if self._search is not None else list(self._generators)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """See `InPlaceMethod.restructure`."""
        if structure["layers"] is not None:
            self._keep(structure["layers"])

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {} if self._search is None else self._search.state()

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if state:
            assert self._search is not None, "load() has not ended the search"
            self._search.load_state(state)

    @property
    def _is_searched(self) -> bool:
        return self.search and self.layers is None

    def _num_layers(self, model: Any) -> int:
        """K, for a model of so many blocks."""
        num_blocks = len(blocks(model))
        if num_blocks < 2:
            raise ValueError(
                "The model has a single block, and prompts are made between blocks; use another "
                "method or model."
            )
        if self.layers is not None:
            if not self.layers or not 0 < min(self.layers) <= max(self.layers) < num_blocks:
                raise ValueError(
                    f"`layers` is {list(self.layers)}; name at least one of the blocks 1 to "
                    f"{num_blocks - 1} (the first, 0, reads the soft prompt)."
                )
            return len(self.layers)
        if self.num_layers is None:
            return min(NUM_LAYERS, max(1, round(num_blocks / 4)))
        if not 0 < self.num_layers < num_blocks:
            raise ValueError(
                f"`num_layers` is {self.num_layers}, but prompts can be made before 1 to "
                f"{num_blocks - 1} of the model's blocks; give a number among these."
            )
        return self.num_layers

    def _writers(self) -> dict[int, Writer]:
        """What makes prompts, by block, with the gates of this moment."""
        if self._search is None:
            return {i: functools.partial(mix, made, None) for i, made in self._generators.items()}
        gates = self._search.gates()
        return {i: functools.partial(mix, made, gates[i]) for i, made in self._generators.items()}

    def _keep(self, layers: Sequence[int]) -> None:
        """End the search: only generators before these blocks are left, for good."""
        for index in [index for index in self._generators if index not in layers]:
            del self._generators[index]
            delattr(blocks(self.model)[index], GENERATOR)
        self._search = None

    def _draw_anew(self) -> None:
        """Begin again with what was found: weights as at the start of a run, without a past."""
        assert self._session is not None
        self._slots.draw_soft_prompt()
        for generator in self._generators.values():
            generator.draw()
        drawn = list(self.adapter_parameters().values())
        replicas.share(drawn)
        train_what_is_left(self._session.optimizer, self.model, anew=drawn)


def evenly_spaced(candidates: Sequence[int], count: int) -> list[int]:
    """As many of the candidates as that, each in the middle of an equal share of them."""
    return [candidates[len(candidates) * (2 * j + 1) // (2 * count)] for j in range(count)]
