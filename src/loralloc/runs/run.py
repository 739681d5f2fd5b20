"""A whole run: from options to a folder that stock PEFT opens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from loralloc.allocation import replicas
from loralloc.allocation.layers import base_model
from loralloc.allocation.record import Round
from loralloc.methods.alora import Alora
from loralloc.methods.method import Method
from loralloc.runs import card, data, folder, protocol
from loralloc.runs.adaptation import Backbone, adapt, method_of
from loralloc.runs.arguments import RunArguments
from loralloc.runs.checks import check_followed, check_measure, check_optimizer
from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.heads.span import SPAN
from loralloc.runs.inputs import check_same, hashes
from loralloc.runs.models import (
    backbone_options,
    built_in,
    is_encoder,
    load_tokenizer,
    load_with_new_head,
    locate,
)
from loralloc.runs.options import check_conditions, check_head_options, check_options
from loralloc.runs.settings import Settings, resolve, resolve_again, with_same_steps
from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import in_common
from loralloc.tasks.conversations import Common
from loralloc.tasks.source import Split
from loralloc.tasks.task import Task
from loralloc.training.drive import drive
from loralloc.training.seal import newest_whole

HEADS = {"lm": LM, "classification": CLASSIFICATION, "span": SPAN}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that training needs, checked and ready; made by `prepare`."""

    settings: Settings
    """Every option, with where it came from."""

    method: Method
    """How the model is adapted."""

    model: Any
    """The adapted model."""

    tokenizer: PreTrainedTokenizerBase
    """The model's."""

    trainer: Trainer
    """What trains the model; callbacks may be added to it."""

    splits: dict[str, Split]
    """The rows as loaded."""

    task: Task | None
    """The data set by name, where one was named."""

    head: Head
    """What the model is trained for."""

    labels: tuple[str, ...]
    """Names of a classifier's labels, in the order of its logits; otherwise empty."""

    conversation: Common | None
    """What the conversations to train on have in common; None where the rows are others."""

    inputs: Mapping[str, str]
    """Hashes of the examples and the backbone."""

    checkpoint: Path | None = None
    """Where training goes on from."""

    overwrite: bool = False
    """Whether a run that is in the folder is replaced once this one begins to train."""

    @property
    def allocation(self) -> Alora | None:
        """The method, where it moves ranks: its rounds and their steps."""
        return self.method if isinstance(self.method, Alora) else None


def prepare(
    options: Settings | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    on_round: Callable[[Round], None] | None = None,
    load: Backbone = load_with_new_head,
) -> Run:
    """Load data and model, and build the trainer of a run, as `loralloc train` does.

    What can be refused is refused here, before anything is written. A folder that holds a run is
    left as it is unless one of `resume` and `overwrite` is set.

    Args:
        options: Those of `loralloc train` by the names of its flags, with values of Python's types
            or as text. The allocation's are `allocation.name` or in a mapping `allocation`; a
            method's own are `method.name`, or in a mapping `method`, whose `name` is the method;
            `config` names a YAML file, over which the others win.
        resume: Go on from the last checkpoint in the run folder, with the options of the run
            that is there; those given now win.
        overwrite: Replace the run in the folder, once training has begun.
        force: Resume although the examples or the backbone are not those of the run's beginning.
        on_round: Called with each round of allocation once it has taken place.
        load: What loads the backbone, where runs share one; see `FleetRuns`.

    Returns:
        The run, for `train`; its `trainer` takes callbacks, and its `allocation` says where rounds
        will be.

    Raises:
        ValueError: Options, data and model do not fit together, or the folder holds a run; one
            sentence.
        FileNotFoundError: There is no run to resume.
        TypeError: The adapter or the way of running has no rank allocation.

    Example:
        >>> run = loralloc.prepare(  # doctest: +SKIP
        ...     {
        ...         "task": "sst2",
        ...         "dataset_name": "data/sst2",
        ...         "learning_rate": 2e-4,
        ...         "allocation": {"num_rounds": 4},
        ...     }
        ... )
        >>> run.allocation.steps  # doctest: +SKIP
        >>> loralloc.train(run)  # doctest: +SKIP
    """
    if force and not resume:
        raise ValueError(
            "`force` lets a run be resumed with other data, and this one is not resumed; leave it "
            "out."
        )
    if resume and overwrite:
        raise ValueError(
            "`resume` goes on with the run in the folder and `overwrite` replaces it; give one of "
            "the two."
        )
    if not isinstance(options, Settings | Mapping):
        raise TypeError(
            f"The options are {options!r:.60}; give a mapping, in which `config` may name a file."
        )
    if isinstance(options, Settings):
        settings = options
    else:
        settings = resolve_again(options) if resume else resolve(options)
    where = settings.output_dir
    # Only by the process that writes there: to the others it may look as if a run were there.
    checkpoint = replicas.agreed(
        replicas.together(
            lambda: (
                _look(where, resume=resume, overwrite=overwrite)
                if settings.training.should_save
                else None
            )
        )
    )
    if checkpoint:
        settings = with_same_steps(settings, before=folder.claimed_processes(where))
    missing = [path for path in (where, *where.parents) if not path.exists()]
    try:
        run = _prepare(settings, on_round, load)
    finally:
        # Trainer makes its output folder when it is built, and those above it.
        for made in missing if settings.training.should_save else ():
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
    if resume and not force:
        check_same(where, folder.claimed_inputs(where), run.inputs)
    return dataclasses.replace(run, checkpoint=checkpoint, overwrite=overwrite)


def _look(where: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Look into the run folder for what is to be gone on from, or is in the way.

    Returns:
        The checkpoint to go on from.

    Raises:
        ValueError: The folder is not free, or there is nothing to resume.
    """
    checkpoint = folder.checkpoint_to_resume(where) if resume else None
    if folder.holds_run(where) and not (resume or overwrite):
        raise ValueError(
            f"{where} already holds a run; go on with `--resume`, replace it with `--overwrite`, "
            "or name another `--output_dir`."
        )
    folder.check_free(where)
    return checkpoint


def _prepare(settings: Settings, on_round: Callable[[Round], None] | None, load: Backbone) -> Run:
    check_options(settings)
    check_optimizer(settings)
    method = method_of(settings)
    task = get_task(settings.run.task) if settings.run.task else None
    splits = data.load(settings, task)
    name, trusts = settings.model.model_name_or_path, settings.training.trust_remote_code
    more = settings.training.model_init_kwargs
    backbone = backbone_options(settings.model, trust_remote_code=trusts, more=more)
    hub = {option: backbone[option] for option in ("revision", "trust_remote_code")}
    replicas.together(lambda: locate(name) if replicas.is_first() else None)  # it may be made
    head = choose_head(settings.run, task, model=name, is_encoder=is_encoder(name, **hub))
    check_head_options(settings, head)
    tokenizer = load_tokenizer(name, **hub)
    set_seed(settings.training.seed)  # before the adapter's weights are drawn
    rows, labels = head.rows(data.used(splits), task, settings.run)
    ready = data.with_validation(data.numbered(rows), settings)
    settings = protocol.apply(settings, num_examples=len(ready["train"].dataset))
    check_conditions(settings)
    check_measure(settings, head)
    model = adapt(settings, method, head, load=load, labels=labels, **backbone)
    if settings.training.use_liger_kernel:
        from loralloc.runs.liger import fit_liger

        fit_liger(settings.training, base_model(model))
    trainer = head.trainer(model, tokenizer, ready, settings)
    if settings.run.cuda_graphs:
        from loralloc.runs.graphs import fit_graphs

        fit_graphs(trainer, settings)
    settings = protocol.follow(trainer, settings)
    drive(trainer, method, on_round=on_round)
    check_followed(trainer, method)
    return Run(
        settings=settings,
        method=method,
        model=model,
        tokenizer=tokenizer,
        trainer=trainer,
        splits=splits,
        task=task,
        head=head,
        labels=labels,
        conversation=in_common(ready["train"].dataset),
        inputs=hashes(trainer),
    )


def train(run: Run) -> None:
    """Train, and write the run folder.

    The folder holds the adapter, the tokenizer, a card, and every setting, log entry and round;
    the guide lists its files. Where there are several processes, the main one writes them.

    Args:
        run: What `prepare` gave.

    Raises:
        ValueError: The checkpoint to go on from is of another run; nothing is written then.
        RuntimeError: Training ended before the method did what it is for.

    Example:
        >>> run = loralloc.prepare({"dataset_name": "demo", "max_steps": 96})  # doctest: +SKIP
        >>> loralloc.train(run)  # doctest: +SKIP
    """
    where, writes = run.settings.output_dir, run.trainer.args.should_save
    with replicas.together(lambda: _locked(run) if writes else nullcontext()):
        if run.checkpoint:
            run.method.check_saved(run.checkpoint)
        run.trainer.add_callback(FolderWriter(run))
        run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        if writes:
            _write(run, where)


def _locked(run: Run) -> AbstractContextManager[Any]:
    """The lock on the run folder, unless another run was in it since this one was prepared."""
    where = run.settings.output_dir
    lock = folder.locked(where)
    if run.checkpoint:
        is_same = newest_whole(where) == run.checkpoint
    else:
        is_same = run.overwrite or not folder.holds_run(where)
    if not is_same:
        lock.release()
        raise ValueError(
            f"Another process has trained in {where} since this run was prepared; begin again."
        )
    return lock


def _write(run: Run, where: Path) -> None:
    """Write what a run ends with."""
    base = str(run.settings.model.model_name_or_path)
    run.method.save(where)
    if carried := built_in(base):
        folder.name_base(where, carried.hub_name)
    run.tokenizer.save_pretrained(where)
    if run.labels:
        folder.save_labels(where, run.labels)
    if run.conversation:
        folder.save_conversation(where, run.conversation)
    card.write(
        where,
        base_model=base,
        data=_data_name(run.settings),
        head=run.head,
        num_labels=len(run.labels),
        method=run.method,
        record=run.allocation.record if run.allocation else None,
        log=run.trainer.state.log_history,
    )
    folder.end(where)


class FolderWriter(TrainerCallback):
    """Begins the run folder once training has really begun, and adds every log entry to it.

    Until then a checkpoint may be refused, and what is in the folder stays as it was.
    """

    def __init__(self, run: Run) -> None:
        """Write into the folder of this run."""
        self._run = run
        self._folder = run.settings.output_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Make room for the run, and write its settings."""
        if not args.should_save:
            return
        if self._run.checkpoint:
            folder.forget_metrics(self._folder, after=state.global_step)
        else:
            folder.set_aside(self._folder)
        folder.claim(self._folder, inputs=self._run.inputs, num_processes=args.world_size)
        self._run.settings.save()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write an entry as a line of JSON."""
        if args.should_save:
            line = json.dumps({"step": state.global_step, **(logs or {})}, default=float)
            with (self._folder / folder.METRICS).open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _data_name(settings: Settings) -> str:
    return str(settings.script.dataset_name or settings.run.task or "a mixture of data sets")


def choose_head(options: RunArguments, task: Task | None, *, model: str, is_encoder: bool) -> Head:
    """The head that is asked for, or the one that suits model and task.

    Raises:
        ValueError: Model, task and head do not go together.
    """
    chosen = _automatic(task, model, is_encoder) if options.head == "auto" else HEADS[options.head]
    chosen.check(model, task, is_encoder)
    return chosen


def _automatic(task: Task | None, model: str, is_encoder: bool) -> Head:
    for head in HEADS.values():
        if head.suits(task, is_encoder):
            return head
    assert task is not None, "without a task, every model has a head that suits it"
    raise ValueError(
        f"{model} is an encoder and cannot generate, and the task {task.name} is to generate text; "
        "use a causal language model."
    )
