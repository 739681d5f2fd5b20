"""Methods by name: ours, and a user's own."""

import itertools
import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from peft import TaskType

from loralloc import open_adapter
from loralloc.methods.bitfit import BitFit
from loralloc.methods.catalog import METHODS, get_method, learning_rates
from loralloc.methods.method import About


@dataclass(kw_only=True)
class OnlyLast(BitFit):
    """A method of a user's own."""

    about: ClassVar[About] = About(
        name="only-last", title="OnlyLast", paper="nobody", status="reconstruction"
    )


@pytest.mark.parametrize("name", METHODS)
def test_ours_are_named_as_they_name_themselves(name):
    assert get_method(name).about.name == name


@pytest.mark.parametrize("name", METHODS)
def test_ours_say_whose_their_start_their_settings_and_their_learning_rate_are(name):
    about = get_method(name).about
    assert about.initialisation and about.settings and about.rate_from
    rates = learning_rates(about)
    assert len(rates) == 5 and rates[2] == about.learning_rate
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10**0.5] * 4, rel=0.05)


def test_a_search_needs_a_rate_to_go_around_and_an_odd_number_of_trials():
    with pytest.raises(ValueError, match="only-last recommends no learning rate"):
        learning_rates(OnlyLast.about)
    with pytest.raises(ValueError, match="`num_trials` is 4; it must be an odd number"):
        learning_rates(get_method("lora").about, num_trials=4)


def test_a_users_own_is_named_by_module_and_class():
    assert get_method(f"{__name__}:OnlyLast") is OnlyLast


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sroa", "There is no method 'sroa'; did you mean 'sora'"),
        ("no_such_package:Class", "`method` is .* but no_such_package cannot be imported"),
        (f"{__name__}:Nothing", "has no 'Nothing'"),
        (f"{__name__}:tiny", "which is a module and cannot be called"),
        (f"{__name__}:saved", "is no method: it must be a subclass of loralloc.Method"),
        ("loralloc.methods.method:Method", "is no method"),
    ],
)
def test_what_is_no_method_is_refused_in_a_sentence(name, words):
    with pytest.raises(ValueError, match=words):
        get_method(name)


def test_a_module_of_the_working_directory_is_found_by_an_installed_command(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from loralloc.methods.lora import Lora\nclass Mine(Lora): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    assert get_method("of_mine:Mine").__name__ == "Mine"
    assert sys.path == before


def saved(folder):
    model = tiny.gpt2()
    method = OnlyLast()
    method.prepare(model, task_type=TaskType.CAUSAL_LM)
    with torch.no_grad():
        for parameter in method.adapter_parameters().values():
            parameter.add_(1.0)
    method.save(folder)
    return model


def test_what_a_users_own_method_saved_opens_with_its_class(tmp_path):
    model = saved(tmp_path)
    opened = open_adapter(tiny.gpt2(), tmp_path, method=OnlyLast)
    batch = tiny.causal_batch()
    torch.testing.assert_close(opened(**batch).logits, model.eval()(**batch).logits)
    with pytest.raises(ValueError, match="There is no method 'only-last'"):
        open_adapter(tiny.gpt2(), tmp_path)


def test_a_folder_imports_nothing(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "method.json").read_text())
    config["method"] = f"{__name__}:OnlyLast"
    (tmp_path / "method.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="There is no method"):
        open_adapter(tiny.gpt2(), tmp_path)
