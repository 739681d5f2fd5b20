"""Learned-Adapter (Zhang et al. 2023c): adapters whose inner structure is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.blocks import backbone, blocks, hidden_size, sublayers
from loralloc.methods.bottleneck import ADAPTER, act_sequentially
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.learned_adapter.cell import Cell, most_parameters
from loralloc.methods.learned_adapter.search import best, by_ablation, by_gradient
from loralloc.methods.learned_adapter.sequence import Sequences, is_causal
from loralloc.methods.method import About
from loralloc.methods.optimizer import train_what_is_left
from loralloc.methods.session import Session

Score = Literal["gradient", "ablation"]

WARMUP = 4
"""Training before the first round over training between two: K1 of 1 epoch, K2 of a quarter."""


@dataclass(kw_only=True)
class LearnedAdapter(InPlaceMethod):
    """y + W_up op(act(W_down y)) after every attention and feed-forward layer, act and op chosen.

    The hyper-network computes the mean over all candidates, in every adapter. It is trained for a
    while, then in each round candidates are chosen for a part of the adapters by AB-LoRA's score
    (see `learned_adapter_search`), and what is left of it trains on in between.
    """

    bottleneck: int | None = None
    """Size between the two products; None for what the budget allows."""

    search_share: float = 0.25
    """Steps until the last round, on top of the run's, as a share of these; above 0 and at most 1.
    With 0.175 and 10 epochs, rounds begin after one epoch and are a quarter of an epoch apart."""

    num_rounds: int = 4
    """Rounds, each choosing for as many adapters as the others, drawn by the seed; at least 1."""

    retrain: bool = True
    """Whether weights are drawn anew after the last round; otherwise they train on."""

    score: Score = "gradient"
    """How candidates are compared: "gradient" is the score to first order, one backward pass a
    round; "ablation" is the score exactly, 14 forward passes an adapter, whose differences are
    smaller than the rounding of a bf16 backbone, on which it is refused."""

    size: ClassVar[str] = "bottleneck"
    about: ClassVar[About] = About(
        name="learned-adapter",
        title="Learned-Adapter (our subset)",
        paper="Zhang et al. 2023c",
        status="reconstruction",
        initialisation="ours",
        settings="ours",
        learning_rate=3e-4,
        rate_from="Houlsby et al. 2019's for adapters; no code was published",
        differs="No code was published. Of its space: sequential adapters without bias, one "
        "activation of ReLU, GELU, SiLU and Tanh, then nothing, a b x b matrix or a depthwise "
        "convolution over three tokens (causal in decoders, around the token in encoders); no "
        "self-attention, parallel adapters or links between adapters. The score is taken to first "
        "order, the order of the rounds is drawn, and weights are trained anew after the search.",
    )
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 40, "search_share": 0.175}

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        if not 0 < self.search_share <= 1:
            raise ValueError(
                f"`search_share` is {self.search_share!r}; it must be above 0 and at most 1."
            )
        if self.score not in get_args(Score):
            raise ValueError(f"`score` is {self.score!r}; use one of {get_args(Score)}.")
        if self.num_rounds < 1:
            raise ValueError(
                f"`num_rounds` is {self.num_rounds!r}; it must be a whole number of at least 1."
            )

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`: at most so many, with the largest operation everywhere."""
        return len(sublayers(model)) * most_parameters(hidden_size(model), size)

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        assert self.bottleneck is not None, "fit() chooses it"
        self._first_eligible_step = 0
        self._optimizer: Optimizer | None = None
        sequences = Sequences(is_causal=is_causal(blocks(model)[0]))
        sequences.follow(backbone(model))
        for sublayer in sublayers(model):
            cell = Cell(hidden_size(model), self.bottleneck, sequences)
            cell.to(next(sublayer.owner.parameters()).device)
            sublayer.owner.add_module(ADAPTER, cell)
            act_sequentially(sublayer, cell)

    def cells(self) -> dict[str, Cell]:
        """The adapters by their names in the model."""
        return {n: module for n, module in self.model.named_modules() if isinstance(module, Cell)}

    def search_steps(self, num_steps: int) -> int:
        """See `Method.search_steps`."""
        return max(1, round(self.search_share * num_steps))

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return self._first_eligible_step

    def join(self, session: Session) -> None:
        """See `Method.join`.

        Raises:
            ValueError: Losses are too coarse for the score.
        """
        assert session.objective is not None, "wants() asked for held-out examples"
        rounding = session.objective.rounding if self.score == "ablation" else None
        if rounding:
            raise ValueError(
                f"`score` is 'ablation', but the model computes in {str(rounding)[6:]}, whose "
                "rounding hides the differences of candidates; use 'gradient', or float32 weights."
            )
        self._objective = session.objective

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        self._optimizer = session.optimizer
        steps = round_steps(session.search_steps, self.num_rounds)
        self._first_eligible_step = steps[-1]
        self._rounds = dict(zip(steps, self._drawn_parts(session.seed), strict=True))

    def _drawn_parts(self, seed: int) -> list[list[str]]:
        """Names of the cells that each round chooses for, as equally many as can be."""
        names = list(self.cells())
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        return [
            sorted(names[i] for i in order[part :: self.num_rounds])
            for part in range(self.num_rounds)
        ]

    def step(self, number: int) -> None:
        """See `Method.step`: the round that takes place after this step, if any."""
        if number not in self._rounds:
            return
        cells = self.cells()
        score = by_gradient if self.score == "gradient" else by_ablation
        chosen = {name: cells[name] for name in self._rounds[number]}
        scores = replicas.agreed(score(self._objective, chosen))
        self.restructure(
            {
                name: {choice: [candidate] for choice, candidate in best(found).items()}
                for name, found in scores.items()
            }
        )
        assert self._optimizer is not None, "begin() comes first"
        anew: list[nn.Parameter] = []
        if number == self._first_eligible_step and self.retrain:
            for cell in cells.values():
                cell.draw()
                replicas.share(cell.parameters())
                anew += cell.parameters()
        train_what_is_left(self._optimizer, self.model, anew=anew)

    def structure(self) -> dict[str, Any]:
        """See `InPlaceMethod.structure`: what there is to choose from, by adapter."""
        return {
            name: {"activations": list(cell.activations), "operations": list(cell.operations)}
            for name, cell in self.cells().items()
        }

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """See `InPlaceMethod.restructure`."""
        for name, cell in self.cells().items():
            if name in structure:
                cell.keep(**structure[name])

    def finish(self) -> None:
        """See `Method.finish`."""
        left = sum(not cell.is_chosen for cell in self.cells().values())
        if left:
            raise RuntimeError(
                f"The run ended while {left} adapters were still mixtures of their candidates; "
                f"train for more steps than the {self._first_eligible_step} of the search."
            )
        self._optimizer = None  # the model holds its method, and need not hold the run's moments


def round_steps(search_steps: int, num_rounds: int) -> list[int]:
    """The steps after which a round takes place, the last at the search's end.

    Raises:
        ValueError: There are fewer steps than rounds.
    """
    if search_steps < num_rounds:
        raise ValueError(
            f"The search has {search_steps} steps for its {num_rounds} rounds; train for more "
            "steps, raise `search_share` or lower `num_rounds`."
        )
    parts = WARMUP + num_rounds - 1
    wanted = [round(search_steps * (WARMUP + k) / parts) for k in range(num_rounds)]
    # In a short run, each round at a step of its own, counted from the end.
    return [min(step, search_steps - (num_rounds - 1 - k)) for k, step in enumerate(wanted)]
