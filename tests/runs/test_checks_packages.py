"""An option that needs a package which is not there is refused with the package's name."""

import importlib.util
import re

import pytest
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from loralloc.runs import checks
from loralloc.runs.checks import NEEDS, check_packages
from loralloc.runs.settings import resolve


@pytest.fixture
def nothing_more(monkeypatch):
    """None of the packages is installed, whatever is."""
    monkeypatch.setattr(checks, "find_spec", lambda _: None)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--load_in_4bit", "true"], "bitsandbytes"),
        (["--load_in_8bit"], "bitsandbytes"),
        (["--use_liger_kernel", "true"], "liger-kernel"),
        (["--attn_implementation", "flash_attention_2"], "flash-attn"),
        (["--attn_implementation", "kernels-community/flash-attn2"], "kernels"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--optim", "stable_adamw"], "torch-optimi"),
        (["--report_to", "wandb"], "wandb"),
        (["--deepspeed", "zero.json"], "deepspeed"),
    ],
)
def test_the_package_is_named_before_anything_is_loaded(flags, package, nothing_more):
    option, value = flags[0].removeprefix("--"), (flags[1:] or ["true"])[0]
    with pytest.raises(ValueError) as refused:
        resolve(flags)
    assert str(refused.value) == (
        f"`{option}` is {True if value == 'true' else value!r}, which needs a package that is not "
        f"installed: run `pip install {package}`, or leave the option out."
    )


def test_options_that_need_no_package_are_let_through(nothing_more):
    resolve(["--attn_implementation", "eager", "--optim", "sgd", "--load_in_4bit", "false"])
    check_packages({})


def test_each_of_several_values_is_looked_at(nothing_more):
    with pytest.raises(ValueError, match="`report_to` is 'wandb', which needs a package"):
        check_packages({"report_to": ["none", "wandb"]})


def test_one_of_several_packages_is_enough(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: name == "kernels" or None)
    check_packages({"attn_implementation": "flash_attention_2"})


def needed_by(option, value):
    return [n for n in NEEDS if n.option == option and re.fullmatch(n.values, value)]


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_that_cannot_be_imported_is_refused(name, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, report_to="none")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError):
        with pytest.raises(ValueError, match="needs a package"):
            check_packages({"optim": name})
    else:
        check_packages({"optim": name})


@pytest.mark.parametrize("name", INTEGRATION_TO_CALLBACK)
def test_every_place_to_report_to_has_its_package(name):
    assert len(needed_by("report_to", name)) == 1


def test_no_value_needs_two_packages():
    for name in OptimizerNames:
        assert len(needed_by("optim", name.value)) <= 1


def test_a_package_below_one_that_is_not_there_is_not_there():
    assert importlib.util.find_spec("azureml") is None
    with pytest.raises(ValueError, match="pip install azureml-mlflow"):
        check_packages({"report_to": ["azure_ml"]})
