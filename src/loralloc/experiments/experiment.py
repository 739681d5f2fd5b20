"""An experiment as data: which runs it takes, and what the paper printed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["scores", "judged", "cost", "sweep", "ranks"]
"""What is shown: scores of methods by task, scores of a judge, memory and hours, scores by budget,
or where the ranks went."""

Terms = Literal["paper", "fair"]
"""On what terms methods are compared: the paper's one learning rate and its own sizes, or a
learning rate searched for each and one budget of parameters."""

SCALES = ("paper", "small", "smoke")

BASELINE = "lora"
"""What every method is compared with."""

DEFAULT_RANK = 8
"""The LoRA rank whose parameters are the budget of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method as one experiment has it: with options of its own."""

    method: str
    """By the name that `--method` takes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `loralloc train`, over those of every run."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid of runs: backbones x tasks x methods x budgets x seeds x settings."""

    name: str
    """Its name on the command line."""

    title: str
    """What it asks, in a line."""

    source: str
    """The table or figure of the paper, or empty."""

    kind: Kind
    backbones: Mapping[str, str]
    """The backbone at each scale, where none is named."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    """What is compared, by name: methods, and variants of them."""

    variants: Mapping[str, Variant] = field(default_factory=dict)
    """Those of `methods` that are not a method as it is."""

    ranks: tuple[int, ...] = (DEFAULT_RANK,)
    """Budgets, each as the LoRA rank whose parameters it is."""

    ladder: bool = True
    """Whether LoRA stands beside the methods at half, twice and four times the rank, where scores
    are compared on fair terms: what no more rank of LoRA gains, no allocation can."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of every run, over those of the scale; with null one of the scale's is left out."""

    trials: int | None = None
    """Learning rates that a search begins with; None for the usual number."""

    half_powers: tuple[int, ...] | None = None
    """Those rates by half powers of ten above each method's own, in the place of `trials`: short
    runs of few ranks want more than what is recommended."""

    test: Mapping[str, Any] = field(default_factory=dict)
    """Options of every test, over those of the scale; with null one of the scale's is left out."""

    rows: Mapping[str, int] | None = None
    """The first so many of each split; None for the scale's, the shortest."""

    printed: Mapping[str, Any] = field(default_factory=dict)
    """What the paper printed: measure -> method -> value, or method -> task -> value."""

    note: str = ""
    """What has to be said beside it: what the paper leaves open, or what is not known of it."""

    def __post_init__(self) -> None:
        """Refuse what names no task or method."""
        from loralloc.methods.catalog import get_method
        from loralloc.tasks.catalog import get_task

        for name in self.methods:
            get_method(self.variant(name).method)
        for task in self.tasks:
            get_task(task)
        if self.trials is not None and self.half_powers is not None:
            raise ValueError(
                f"The experiment {self.name} has both trials and half_powers, which say the same; "
                "leave one of the two out."
            )
        for what in ("tasks", "methods", "ranks", "half_powers"):
            values = getattr(self, what)
            if values is None:
                continue
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"The experiment {self.name} has {what} {list(values)}; it needs at least one, "
                    "and each once."
                )

    def variant(self, name: str) -> Variant:
        """What a name of `methods` stands for."""
        return self.variants.get(name) or Variant(method=name)

    def only(self, names: Sequence[str]) -> Experiment:
        """The same experiment with some of its methods, LoRA's other ranks only beside LoRA.

        Raises:
            ValueError: It has none of that name.
        """
        unknown = [name for name in names if name not in self.methods]
        if unknown:
            raise ValueError(
                f"The experiment {self.name} compares no {unknown[0]!r}; it has "
                f"{', '.join(map(repr, self.methods))}."
            )
        return replace(self, methods=tuple(names), ladder=self.ladder and BASELINE in names)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs of an experiment are."""

    name: str
    seeds: tuple[int, ...]
    """Of the runs."""

    terms: tuple[Terms, ...]
    """On what terms methods are compared, unless asked otherwise."""

    learning_rate: float
    """The one rate of the paper's terms."""

    settings: Mapping[str, Any]
    """Options of every run."""

    allocation: Mapping[str, Any] = field(default_factory=dict)
    """Options of runs whose ranks move."""

    test: Mapping[str, Any] = field(default_factory=dict)
    """Options of every test."""

    judged: Mapping[str, Any] = field(default_factory=dict)
    """How runs answer the judge's questions."""

    sizes: Literal["paper", "budget"] = "budget"
    """Whether methods have the paper's own sizes on the paper's terms, or the budget's."""

    rows: Mapping[str, int] | None = None
    """Rows of each split at most, the shortest; None for all."""

    ranks: tuple[int, ...] | None = None
    """Budgets in place of an experiment's own, where it has several."""


def experiment_names() -> list[str]:
    """The paper's experiments."""
    found = (files("loralloc.experiments") / "paper").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in found if path.name.endswith(".yaml"))


def load_experiment(name: str) -> Experiment:
    """One of the paper's experiments by its name, or one of your own from a YAML file.

    Raises:
        ValueError: There is none, or the file does not describe one; one sentence.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"There is no file {name}; name a YAML file or one of {_known()}.")
        return _build(path.stem, path.read_text(encoding="utf-8"), source=name)
    if name not in experiment_names():
        near = get_close_matches(name, experiment_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {_known()}."
        raise ValueError(f"There is no experiment {name!r}; {hint}")
    text = (files("loralloc.experiments") / "paper" / f"{name}.yaml").read_text(encoding="utf-8")
    return _build(name, text, source=f"{name}.yaml")


def load_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        ValueError: There is none.
    """
    if name not in SCALES:
        raise ValueError(f"`scale` is {name!r}; use one of {', '.join(SCALES)}.")
    text = (files("loralloc.experiments") / "scales" / f"{name}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    lists = {key: tuple(data[key]) for key in ("seeds", "terms", "ranks") if key in data}
    return Scale(**{"name": name, **data, **lists})


def _known() -> str:
    return ", ".join(experiment_names())


def _build(name: str, text: str, *, source: str) -> Experiment:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    known = {f.name for f in fields(Experiment)} - {"name", "variants"}
    unknown = sorted(set(data) - known) if isinstance(data, dict) else []
    if not isinstance(data, dict) or unknown:
        what = f"the unknown key {unknown[0]!r}" if unknown else "no mapping"
        raise ValueError(f"{source} has {what}; an experiment has {', '.join(sorted(known))}.")
    needed = ("title", "kind", "backbones", "tasks", "methods")
    missing = [key for key in needed if key not in data]
    if missing:
        raise ValueError(
            f"{source} has no {missing[0]!r}; an experiment needs {', '.join(needed)}."
        )
    variants = {}
    for at, entry in enumerate(data["methods"]):
        if isinstance(entry, dict):
            own = _variant(entry, source=source)
            data["methods"][at] = own[0]
            variants[own[0]] = own[1]
    names = ("tasks", "methods", "ranks", "half_powers")
    lists = {key: tuple(data[key]) for key in names if key in data}
    return Experiment(**{"name": name, "source": "", **data, **lists, "variants": variants})


def _variant(entry: Mapping[str, Any], *, source: str) -> tuple[str, Variant]:
    """A variant and its name, from an entry such as {name: ..., method: ..., options: {...}}."""
    if not {"name", "method"} <= set(entry) <= {"name", "method", "options"}:
        raise ValueError(
            f"{source} has a method with the keys {', '.join(map(str, entry))}; give its name, or "
            "`name`, `method` and `options`."
        )
    return entry["name"], Variant(method=entry["method"], options=entry.get("options") or {})
