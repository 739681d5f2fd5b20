"""What is read of Transformers' Trainer beyond its documentation, and that it is there.

Names of this kind change without notice. A trainer that lacks one would fail in the middle of a
run, or worse, go on without what was to take its place.
"""

from __future__ import annotations

import inspect
import typing

import transformers
from transformers import Trainer

NAMES = (
    *("_get_train_sampler", "_load_best_model", "_load_from_checkpoint", "_prepare_inputs"),
    *("_save_checkpoint", "set_initial_training_values"),
)
"""Methods that are called, or that another takes the place of while a method trains."""

NUM_LENGTHS = 7
"""What `set_initial_training_values` gives: the second is steps an epoch, the last steps in all."""


def check_trainer() -> None:
    """Refuse a version of Transformers whose Trainer is another than this package knows.

    Raises:
        ImportError: A name is not there, or means something else.
    """
    wrong = [name for name in NAMES if not hasattr(Trainer, name)]
    if not wrong:
        given = inspect.get_annotations(Trainer.set_initial_training_values, eval_str=True)[
            "return"
        ]
        wrong = [] if len(typing.get_args(given)) == NUM_LENGTHS else [NAMES[-1]]
    if wrong:
        raise ImportError(
            f"Trainer.{wrong[0]} of Transformers {transformers.__version__} is not what loralloc "
            "relies on; install a version that it was tested with (docs/support.md)."
        )
