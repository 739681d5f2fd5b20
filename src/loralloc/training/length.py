"""How long a trainer's run will be."""

from __future__ import annotations

from transformers import Trainer

from loralloc.methods.session import Length


def planned_length(trainer: Trainer) -> Length:
    """Optimiser steps of an epoch and of the whole run, as the trainer will count them.

    Raises:
        ValueError: The training set has no length.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Rounds are placed by epochs, but the training set is a {type(dataset).__name__} "
            "without a length; use a dataset with a length."
        )
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return Length(steps_per_epoch=int(values[1]), num_steps=int(values[6]))
