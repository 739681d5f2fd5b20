"""The command as a person uses it: words in, an exit code and two streams out."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = ("good", "bad")
RUN = {
    "lora_r": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "num_rounds": 2,
    "warmup_epochs": 0.5,
    "recovery_epochs": 0.5,
    "scoring_examples": 4,
}
"""A run of 12 steps with rounds after 3 and 6."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line of an error, once it is known to be one."""
        lines = self.err.splitlines()
        assert self.code == 2, self.err
        assert len(lines) == 1, self.err
        assert lines[0].startswith("loralloc: error: ")
        assert "Traceback" not in self.out
        return lines[0].removeprefix("loralloc: error: ")


@pytest.fixture
def call(capfd, monkeypatch):
    """Run the command in this process, on a wide screen."""
    from loralloc.cli import main

    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def call(*words) -> Answer:
        capfd.readouterr()
        with warnings.catch_warnings():  # the command silences libraries for its whole process
            code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Answer(code=code, out=out, err=err)

    yield call
    _let_libraries_speak_again()


def _let_libraries_speak_again():
    import datasets
    import transformers

    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
    for name in ("trl", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def data(tmp_path, write_rows) -> Path:
    """A folder with prompts and completions: 24 to train on, 8 held out."""

    def rows(count):
        return [
            {"prompt": f"the film {number} is", "completion": f" {WORDS[number % 2]} and warm"}
            for number in range(count)
        ]

    write_rows(tmp_path / "data" / "train.jsonl", rows(24))
    write_rows(tmp_path / "data" / "validation.jsonl", rows(8))
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train_words(data, output, llama_folder):
    """The words of a small run, with some options changed, added or (None) left out."""

    def words(**changes) -> list[str]:
        options = {
            "dataset_name": data,
            "model_name_or_path": llama_folder,
            "output_dir": output,
            **RUN,
            **changes,
        }
        parts = [(f"--{k}", str(v)) for k, v in options.items() if v is not None]
        return ["train", *(word for part in parts for word in part)]

    return words


@pytest.fixture
def train(call, train_words):
    """Train, or try to: flags first, options by name."""

    def train(*flags, **changes) -> Answer:
        return call(*train_words(**changes), *flags)

    return train
