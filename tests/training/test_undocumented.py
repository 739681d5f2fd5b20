"""What is read of Trainer beyond its documentation."""

import re

import pytest
from transformers import Trainer

from loralloc.training.undocumented import NAMES, check_trainer


def test_this_trainer_is_known():
    check_trainer()


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_without_a_name_is_refused_in_a_sentence(name, monkeypatch):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(
        ImportError, match=rf"^Trainer\.{re.escape(name)} of Transformers .* is not"
    ):
        check_trainer()


def test_lengths_of_another_form_are_refused(monkeypatch):
    def set_initial_training_values(self, args, dataloader) -> tuple[int, int]:
        raise NotImplementedError

    monkeypatch.setattr(Trainer, "set_initial_training_values", set_initial_training_values)
    with pytest.raises(ImportError, match="set_initial_training_values"):
        check_trainer()
