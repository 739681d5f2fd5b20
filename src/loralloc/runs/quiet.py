"""A process that trains and tests for somebody: its threads, and the libraries' own voices."""

from __future__ import annotations

import logging
import warnings

from loralloc.runs.machine import use_physical_cores


def prepare_process() -> None:
    """One thread a core, and the libraries' own bars and notices out of the way of ours."""
    use_physical_cores()
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # PEFT looks for keys of parameters among modules, warns, and uses them; lint tells idle ones.
    warnings.filterwarnings("ignore", "The following .* keys did not match", RuntimeWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
