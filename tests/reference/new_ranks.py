"""What a new rank begins with, one number at a time, and Adam as its paper prints it."""

import math


def survivors_mean(state: list[list[float]], kept: list[int]) -> list[float]:
    """Of each element of a rank, the mean over the ranks that stay.

    Args:
        state: A row for every rank of the module, before the round.
        kept: The ranks that stay.
    """
    return [
        sum(state[rank][element] for rank in kept) / len(kept) for element in range(len(state[0]))
    ]


def adam(gradients, *, m=0.0, v=0.0, step=0, lr=1.0, b1=0.9, b2=0.999, eps=1e-8) -> list[float]:
    """The updates of one number under Kingma and Ba 2015, Algorithm 1, from this state on."""
    updates = []
    for gradient in gradients:
        step += 1
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
        updates.append(-lr * m_hat / (math.sqrt(v_hat) + eps))
    return updates


def with_potential(
    importance: dict[str, list[float]],
    norms: dict[str, list[float]],
    young: dict[str, set[int]],
) -> dict[str, list[float]]:
    """IS(i) + k |dL/db_i| of a young rank, IS(r) of an old one.

    Args:
        importance: IS of every rank, by module.
        norms: |dL/db_r| at the trained adapter.
        young: Ranks that are young.
    """
    made, num_old, had, num_young = 0.0, 0, 0.0, 0
    for name, values in importance.items():
        for rank, value in enumerate(values):
            if rank in young[name]:
                had += norms[name][rank]
                num_young += 1
            else:
                made += value
                num_old += 1
    k = (made / num_old) / (had / num_young) if made > 0 and had > 0 else 0.0
    return {
        name: [
            value + k * norms[name][rank] if rank in young[name] else value
            for rank, value in enumerate(values)
        ]
        for name, values in importance.items()
    }
