"""What an optimiser keeps of LoRA weights that take their singular form, element by element."""

import numpy as np


def followed(old: np.ndarray, new: np.ndarray, kept: np.ndarray, power: int) -> np.ndarray:
    """State of A, whose rows became others of the same span, of shape (num_ranks, in_features).

    With old = P new, an element of the gradient of row k of the new is the sum over rows j of the
    old of P_jk times that of row j: of what is kept, each is multiplied by P_jk to a power.

    Args:
        old: A before, shape (num_ranks, in_features).
        new: A after.
        kept: What was kept of the old, of the same shape.
        power: Of the gradient: 1 of its mean, 2 of the mean of its squares.
    """
    p = np.linalg.lstsq(new.T, old.T, rcond=None)[0].T
    result = np.zeros_like(kept)
    for k in range(len(new)):
        for column in range(kept.shape[1]):
            for j in range(len(old)):
                result[k, column] += p[j, k] ** power * kept[j, column]
    return result


def followed_columns(old: np.ndarray, new: np.ndarray, kept: np.ndarray, power: int) -> np.ndarray:
    """State of B, of shape (out_features, num_ranks), where A became another.

    With new = T old, the gradient of column k of the new B is the sum over columns j of T_kj times
    that of column j.

    Args:
        old: A before, shape (num_ranks, in_features).
        new: A after.
        kept: What was kept of B.
        power: Of the gradient, as above.
    """
    t = np.linalg.lstsq(old.T, new.T, rcond=None)[0].T
    result = np.zeros_like(kept)
    for k in range(len(new)):
        for row in range(kept.shape[0]):
            for j in range(len(old)):
                result[row, k] += t[k, j] ** power * kept[row, j]
    return result
