import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loralloc


def modules_after(statement: str) -> set[str]:
    """What a fresh process has imported after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy"}
    assert not heavy & modules_after("import loralloc")


@pytest.mark.parametrize("name", loralloc.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(loralloc, name)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_examples_of_public_names_are_true():
    runner, found = doctest.DocTestRunner(), 0
    for name in loralloc.__all__:
        scope = {"torch": torch, **{n: getattr(loralloc, n) for n in loralloc.__all__}}
        examples = doctest.DocTestFinder(recurse=False).find(
            getattr(loralloc, name), name, module=False, globs=scope
        )
        for example in examples:
            found += len([e for e in example.examples if doctest.SKIP not in e.options])
            runner.run(example)
    assert found > 3
    assert runner.summarize(verbose=False).failed == 0


def test_importing_takes_less_than_a_third_of_a_second():
    code = "import time; t = time.process_time(); import loralloc; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_public_names_come_in_alphabetical_order_and_once():
    names = [name for name in loralloc.__all__ if name != "__version__"]
    assert names == sorted(set(names))


def test_type_checkers_know_every_public_name():
    """Those read the imports that are never carried out."""
    named = re.findall(r" as (\w+)$", Path(loralloc.__file__).read_text(), re.MULTILINE)
    assert sorted(named) == sorted(name for name in loralloc.__all__ if name != "__version__")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'loralloc' has no attribute 'nothing'"):
        loralloc.nothing  # noqa: B018
