"""ALoRA with its decisions drawn, or turned round: what a run of ALoRA has to be better than."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.alora import Alora
from loralloc.methods.lora import CONTROL
from loralloc.methods.method import About


class _Control(Alora):
    """ALoRA with one option of its allocation fixed."""

    fixed: ClassVar[tuple[str, str]]
    """The option and its value."""

    def __post_init__(self) -> None:
        """Fix the option.

        Raises:
            ValueError: It was given another value, or the options are for shrinking.
        """
        super().__post_init__()
        option, value = self.fixed
        given = getattr(self.allocation, option)
        if given not in (getattr(AllocationConfig, option), value):
            raise ValueError(
                f"`{option}` is {given!r}, but {self.about.name} is ALoRA with `{option}` of "
                f"{value!r}; leave it out, or use alora."
            )
        changed: dict[str, Any] = {option: value}
        self.allocation = dataclasses.replace(self.allocation, **changed)


@dataclass(kw_only=True)
class RandomRounds(_Control):
    """As many ranks move as in ALoRA, at the same steps, but which ones is drawn."""

    about: ClassVar[About] = dataclasses.replace(
        CONTROL,
        name="random",
        title="ALoRA, drawn",
        rate_from="LoRA's, which it is between rounds",
        differs="ALoRA whose importance is drawn at every round: what is better than it is not the "
        "rounds' own doing.",
    )
    fixed: ClassVar[tuple[str, str]] = ("score", "random")


@dataclass(kw_only=True)
class InverseRounds(_Control):
    """The ranks of the highest importance are pruned, the modules of the lowest receive."""

    about: ClassVar[About] = dataclasses.replace(
        CONTROL,
        name="inverse",
        title="ALoRA, inverted",
        rate_from="LoRA's, which it is between rounds",
        differs="ALoRA with minus its scores: were it as good as ALoRA, the score would say "
        "nothing.",
    )
    fixed: ClassVar[tuple[str, str]] = ("policy", "inverse")
