"""What the dotted name of a module tells: its layer, and its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def split_name(module: str) -> tuple[str, int, str] | None:
    """A dotted name as (stack, layer, kind), parted at its first integer.

    "model.layers.3.mlp.up_proj" is ("model.layers", 3, "mlp.up_proj"). None for a name without an
    integer, or with nothing after it ("lm_head", "classifier.0"): no module of a layer.
    """
    parts = module.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdecimal():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


def short_labels(kinds: Sequence[str]) -> dict[str, str]:
    """For each kind, its shortest dotted suffix that ends no other kind (else its whole name)."""
    labels = {}
    for kind in kinds:
        parts = kind.split(".")
        suffixes = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        labels[kind] = next(
            (s for s in suffixes if sum(f".{k}".endswith(f".{s}") for k in kinds) == 1), kind
        )
    return labels


def kind_labels(modules: Iterable[str]) -> dict[str, str]:
    """For each module the short label of its kind: "q_proj"; of one in no layer, its whole name."""
    kinds = {name: (split_name(name) or ("", 0, name))[2] for name in modules}
    labels = short_labels(list(dict.fromkeys(kinds.values())))
    return {name: labels[kind] for name, kind in kinds.items()}


def by_kind(counts: Mapping[str, int], modules: Iterable[str]) -> dict[str, int]:
    """Counts of modules summed over the layers, by the label of a kind, in the modules' order.

    Args:
        counts: By module; one that is left out counts 0.
        modules: All modules, which the labels have to tell apart.
    """
    totals: dict[str, int] = {}
    for name, label in kind_labels(modules).items():
        totals[label] = totals.get(label, 0) + counts.get(name, 0)
    return totals
