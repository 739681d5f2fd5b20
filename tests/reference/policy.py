"""One round of Algorithm 1 of Liu et al. 2024 on plain lists, one rank at a time."""

from dataclasses import dataclass, field


@dataclass
class Outcome:
    pruned: dict[str, set[int]] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    spare: int = 0
    lost: int = 0


def plan(
    importance: dict[str, list[float]],
    *,
    num_pruned: int,
    min_rank: int = 0,
    max_rank: int | None = None,
    protected: dict[str, set[int]] | None = None,
    cost: dict[str, int] | None = None,
    spare: int = 0,
) -> Outcome:
    """Prune the least important ranks one by one, then give what they cost, rank by rank."""
    modules = list(importance)
    protected = protected or {}
    cost = {name: (cost or {}).get(name, 1) for name in modules}
    pruned = {name: set() for name in modules}

    # Prune the n_A ranks with the lowest IS, in one pool over the whole model.
    for _ in range(num_pruned):
        candidates = []
        for order, name in enumerate(modules):
            rank_now = len(importance[name]) - len(pruned[name])
            if rank_now <= min_rank:
                continue
            for index, score in enumerate(importance[name]):
                if index not in pruned[name] and index not in protected.get(name, set()):
                    candidates.append((score, order, index))
        if not candidates:
            break
        _, order, index = min(candidates)
        pruned[modules[order]].add(index)

    freed = sum(cost[name] * len(pruned[name]) for name in modules)

    # Modules that lost no rank in this round, and still have one, receive.
    receivers = [name for name in modules if not pruned[name] and importance[name]]
    added = dict.fromkeys(modules, 0)
    if not receivers:
        return Outcome(pruned, added, spare=spare, lost=freed)

    # As evenly as possible: the next rank goes to whoever has been given the fewest, the
    # remainder to the modules with the highest mean IS, ties to the earlier module.
    available = freed + spare
    while True:
        candidates = []
        for order, name in enumerate(modules):
            if name not in receivers or cost[name] > available:
                continue
            if max_rank is not None and len(importance[name]) + added[name] >= max_rank:
                continue
            mean = sum(importance[name]) / len(importance[name])
            candidates.append((added[name], -mean, order))
        if not candidates:
            return Outcome(pruned, added, spare=available, lost=0)
        _, _, order = min(candidates)
        added[modules[order]] += 1
        available -= cost[modules[order]]
