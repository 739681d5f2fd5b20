"""What a method is to a run: one Protocol for every way of adapting a model.

A run prepares a model with a method, tells the method of every batch and every optimiser step, adds
its extra loss to the training loss, and saves and loads through it. It knows no method by name.
What a method wants of the run and is given by it stands in `methods.session`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import TaskType
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.objective import Batch
from loralloc.methods.session import Length, Session, Wants

Status = Literal["faithful", "port", "reconstruction", "control", "ours"]
"""How near a method's algorithm is to its paper: as published, moved to other backbones, or rebuilt
from the paper's words, where no code was ever published. A control is of no paper: what other
methods have to be better than; ours are what we would use."""

Origin = Literal["published", "ours"]
"""Whose a method's initialisation or settings are: its authors', or chosen here."""

IS_A_BLOCK = "block"
"""Marks a field of a method that is a group of options with a name of its own."""

SEARCH_EXAMPLES = 32
"""Development examples that a search measures on, as the paper's B_val."""

DEFAULT_RANK = 8
"""LoRA's rank whose parameters are the budget where none is given (the paper's comparison)."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a method is, for people."""

    name: str
    """The name in commands."""

    title: str
    """The name in tables."""

    paper: str
    """Authors and year."""

    status: Status
    """Of the algorithm alone; its initialisation and its settings are told apart from it."""

    initialisation: Origin | None = None
    """Whose the weights are that it begins with; None where nothing is said of them."""

    settings: Origin | None = None
    """Whose its options are where nobody gives them, its size and the learning rate apart."""

    learning_rate: float | None = None
    """What its authors train it with, by AdamW, or what those of the nearest method do."""

    rate_from: str = ""
    """Where the learning rate is from."""

    differs: str = ""
    """What is otherwise than in the paper or its code, in a sentence or two."""

    merges: bool = False
    """Whether it can be merged into the backbone, so that inference costs nothing more."""

    starts_as_base: bool = True
    """Whether the model at step 0 computes what the backbone alone computes."""

    why_not_base: str = ""
    """Why it does not, where it does not."""

    keeps_backbone: bool = True
    """Whether the backbone's own weights stay as they are while it trains."""

    shares_prompts: bool = True
    """Whether a prompt may be read in pieces when text is generated. Not where prompts are made
    from the whole of it, or where reading begins with a prefix."""

    task_types: tuple[TaskType, ...] = (TaskType.CAUSAL_LM, TaskType.SEQ_CLS, TaskType.QUESTION_ANS)
    """What it can be used for."""


@dataclass(kw_only=True)
class Method(ABC):
    """A way to adapt a model. Its fields are its options; None is chosen by the budget.

    The order of calls is: `fit`, `prepare`; `wants`, `join` when a run takes it up; for a resumed
    run `check_saved`, `load` and `load_state`; `arrange`, `begin`; for every optimiser step
    `before_step`, for its batches `watch` and `extra_loss`, then `step` and `after_step`; `finish`,
    `save`.
    """

    about: ClassVar[About]

    size: ClassVar[str]
    """The option that a budget chooses: a rank, a bottleneck, a number of tokens. Empty where there
    is one size only."""

    paper: ClassVar[Mapping[str, Any]] = {}
    """The options of the paper's comparison (Liu et al. 2024, Appendix E)."""

    allocates: ClassVar[bool] = False
    """Whether ranks move between modules while it trains, by the options of an allocation."""

    equal_parameters: ClassVar[bool] = False
    """Whether the budget chooses its size where neither is given, in the place of LoRA's rank."""

    finds_its_size: ClassVar[bool] = False
    """Whether a run finds out how many parameters it ends with; its size is the first then."""

    leaves_out: ClassVar[bool] = False
    """Whether a step may leave out some of what trains."""
    model: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)
    """The adapted model, once it is prepared."""

    sized_for: int | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    """The budget that its size was chosen for, in parameters; None where there is none."""

    counted: int | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    """Parameters that it stores at that size by its own count, before a run may end elsewhere."""

    def options(self) -> dict[str, Any]:
        """The options, as plain data."""
        return {name: getattr(self, name) for name in self.option_names()}

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options that have plain values."""
        fields = dataclasses.fields(cls)
        return [f.name for f in fields if f.init and not f.metadata.get(IS_A_BLOCK)]

    def chosen_size(self) -> int:
        """The size as given or as a budget chose it; 0 where there is one only."""
        return int(getattr(self, self.size)) if self.size else 0

    @abstractmethod
    def count(self, model: nn.Module, size: int) -> int:
        """Parameters it would store at that size, for this backbone (it may be on "meta").

        Of a method that ends smaller than it begins: those at its end.
        """

    def fit(self, model: nn.Module, budget: int) -> None:
        """Choose the size whose parameters are nearest to a budget, where none was given.

        Raises:
            ValueError: One unit already costs more than twice the budget.
        """
        if not self.size or getattr(self, self.size) is not None:
            return
        low, high = 1, 1
        while self.count(model, high) < budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.count(model, middle) < budget:
                low = middle
            else:
                high = middle
        best = min((low, high), key=lambda size: abs(self.count(model, size) - budget))
        if self.count(model, best) > 2 * budget:
            raise ValueError(
                f"The budget is {budget:,} parameters, but {self.about.name} with `{self.size}` of "
                f"{best} has {self.count(model, best):,} already; raise `--budget`."
            )
        setattr(self, self.size, best)

    @abstractmethod
    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """Adapt a model; only the method's own weights, and the heads, train afterwards.

        Args:
            model: The backbone, with its head.
            task_type: What it is used for.
            heads: Names of modules that are drawn at random, so that they train and are saved.

        Returns:
            The model to train: the same, or one around it.
        """

    def bears_scaled_loss(self) -> bool:
        """Whether what it does between steps is right in fp16 too, whose loss is scaled."""
        return False

    def search_steps(self, num_steps: int) -> int:
        """Steps that search for a structure, on top of so many that train what was found."""
        return 0

    def wants(self, length: Length) -> Wants:
        """What it asks of a run of this length.

        A search sees one half of the training examples while the weights are trained on the other,
        measures on development examples, and leaves the schedule to begin anew after it. Its steps
        come on top, so that what it found trains for as long as other methods do.
        """
        search = self.search_steps(length.num_steps)
        held_out = SEARCH_EXAMPLES if search else 0
        return Wants(held_out=held_out, half_until=search, on_top=search, restart_at=search)

    def join(self, session: Session) -> None:
        """Be taken up by a run, before it begins; what cannot be done is refused here."""

    def beside(self) -> Mapping[str, Tensor]:
        """What trains beside the model now, by name: processes are kept alike in it too."""
        return {}

    def arrange(self, optimizer: Optimizer) -> None:
        """Give an optimiser that was just made the groups to train in, before its schedule is."""

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """Refuse an optimiser whose state cannot follow what is done to weights.

        Raises:
            TypeError: Naming what it keeps.
        """

    def begin(self, session: Session) -> None:
        """Begin to train, a new run or a resumed one; the optimiser is there."""

    def before_step(self) -> None:
        """Act before the batches of an optimiser step."""

    def watch(self, batch: Batch) -> None:
        """See a batch, with its labels, just before the model does."""

    def extra_loss(self) -> Tensor | None:
        """What is added to the mean loss of a training batch."""
        return None

    def step(self, number: int) -> None:
        """Act after the optimiser's step of this number (from 1); gradients are still there."""

    def after_step(self, number: int, epoch: float) -> bool:
        """Act once gradients are cleared, before anything is evaluated or saved.

        Returns:
            Whether the model has become another, so that no earlier checkpoint may be the best.
        """
        return False

    def first_eligible_step(self) -> int:
        """The first step whose checkpoint may be chosen as the best: the budget is reached."""
        return 0

    def finish(self) -> None:
        """Bring the model into the form that is saved.

        Raises:
            RuntimeError: The run ended before the method did what it is for.
        """

    def release(self) -> None:
        """Take off what a run has hung on the model and the optimiser to train by."""

    def unfinished(self) -> str:
        """Why what it is now may not be saved as its result, in a sentence; empty where it may."""
        return ""

    @abstractmethod
    def num_trained(self) -> int:
        """Parameters that train now, without the task's head and the method's gates."""

    def num_stored(self) -> int:
        """Parameters that one task keeps, without its head: what is not zero by construction."""
        return self.num_trained()

    def over_budget(self) -> float | None:
        """How far what it stores is from the budget, as a share of it; None without a budget."""
        return self.num_stored() / self.sized_for - 1 if self.sized_for else None

    @abstractmethod
    def save(self, folder: Path, **options: Any) -> None:
        """Write what opens the adapted model again, as safetensors and JSON.

        Args:
            folder: Where to.
            options: What PEFT's `save_pretrained` takes, for methods that are PEFT's.
        """

    def findings(self) -> dict[str, float]:
        """Figures of how the method came to what it is, by name, which a run prints at its end."""
        return {}

    def check_saved(self, folder: Path) -> None:
        """Refuse to go on from what another method, or other options, saved.

        Raises:
            ValueError: It does not fit; nothing was changed.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Give the prepared model the structure and the weights that were saved."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beyond `save`, as nested data and tensors."""
        return {}

    def needs_state(self) -> bool:
        """Whether a run cannot be resumed without what `state` gave."""
        return type(self).state is not Method.state

    def load_state(self, state: Any) -> None:
        """Take up what `state` gave."""

    def merge(self) -> Any:
        """The backbone with the adaptation in its weights.

        Raises:
            TypeError: The method cannot be merged.
        """
        raise TypeError(
            f"{self.about.title} adds computations that no weight of the backbone can hold, so it "
            "cannot be merged; keep it as an adapter."
        )


def freeze(model: nn.Module) -> None:
    """Let nothing of a model train."""
    model.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in model order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
