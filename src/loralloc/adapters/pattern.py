"""Ranks by module in the words of other trainers: PEFT, Axolotl, LLaMA-Factory, TRL.

PEFT and Axolotl take a rank for every module. TRL's flags and LLaMA-Factory have one rank for all,
so there the pattern becomes the nearest that they can say: its modules, with its mean rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A rank for every module that has one."""

    ranks: Mapping[str, int]
    """By the module's full name in the backbone; modules of rank 0 are left out."""

    scaling: float
    """What every update is multiplied by: alpha / r, the same for all modules."""

    def __post_init__(self) -> None:
        """Leave out what has no rank.

        Raises:
            ValueError: Nothing is left.
        """
        kept = {name: rank for name, rank in self.ranks.items() if rank}
        if not kept:
            raise ValueError("The pattern has no module with a rank; give it one at least.")
        object.__setattr__(self, "ranks", kept)

    @property
    def usual(self) -> int:
        """The rank that most modules have, the lower one of two."""
        counts = Counter(self.ranks.values())
        return min(counts, key=lambda rank: (-counts[rank], rank))

    @property
    def mean(self) -> int:
        """The mean rank, rounded up: what one rank for all is to be."""
        return math.ceil(sum(self.ranks.values()) / len(self.ranks))

    def peft_options(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`; keys of the patterns match one module each."""
        others = {name: rank for name, rank in self.ranks.items() if rank != self.usual}
        return {
            "r": self.usual,
            "lora_alpha": self._alpha(self.usual),
            "target_modules": list(self.ranks),
            "rank_pattern": {_key(name): rank for name, rank in others.items()},
            "alpha_pattern": {_key(name): self._alpha(rank) for name, rank in others.items()},
        }

    def peft_json(self) -> str:
        """What `peft.LoraConfig(**json.load(file))` takes."""
        return json.dumps(self.peft_options(), indent=1) + "\n"

    def axolotl_yaml(self) -> str:
        """The lines of an Axolotl configuration, pattern and all."""
        options = self.peft_options()
        return _yaml(
            {
                "adapter": "lora",
                "lora_r": options["r"],
                "lora_alpha": options["lora_alpha"],
                "lora_target_modules": options["target_modules"],
                "lora_rank_pattern": options["rank_pattern"],
                "lora_alpha_pattern": options["alpha_pattern"],
            }
        )

    def llama_factory_yaml(self) -> str:
        """The lines of a LLaMA-Factory configuration: the modules, with one rank for all."""
        return _yaml(
            {
                "finetuning_type": "lora",
                "lora_rank": self.mean,
                "lora_alpha": self._alpha(self.mean),
                "lora_target": ",".join(self.ranks),
            }
        )

    def trl_flags(self) -> str:
        """Flags of `trl sft`: the modules, with one rank for all."""
        return (
            f"--use_peft --lora_r {self.mean} --lora_alpha {self._alpha(self.mean)} "
            f"--lora_target_modules {' '.join(self.ranks)}"
        )

    def _alpha(self, rank: int) -> int | float:
        alpha = self.scaling * rank
        return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _key(name: str) -> str:
    """A regular expression that PEFT matches with this module only."""
    return "^" + re.escape(name)


def _yaml(options: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(options), sort_keys=False, width=10_000)
    return text
