"""Rank allocation inside a training loop of one's own: it follows the optimiser's steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.choices import is_gathered, learns_from_batches
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import active_adapter, adapted_part
from loralloc.allocation.objective import Batch, Loss, Objective
from loralloc.allocation.optimizer_state import bare_optimizer
from loralloc.allocation.record import Record, Round
from loralloc.methods.alora import Alora
from loralloc.methods.session import Length, Session
from loralloc.training.replaced import give_back, replace
from loralloc.training.saving import refuse_unfinished, saving_with

logger = logging.getLogger(__name__)


def follow(
    optimizer: Any,
    model: nn.Module,
    config: AllocationConfig | None = None,
    batches: Sequence[Batch] = (),
    *,
    num_steps: int,
    steps_per_epoch: int | None = None,
    loss: Loss | None = None,
    on_round: Callable[[Round], None] | None = None,
    adapter_name: str | None = None,
) -> Following:
    """Let a model's LoRA ranks move while any loop trains it: `attach` without a `Trainer`.

    Every step that the optimiser takes is counted, and a round takes place right after those at
    which one is due. Saving the adapter by the model's `save_pretrained` without any round having
    taken place raises an error.

    Args:
        optimizer: What trains the adapter, under Accelerate's wrapper or not; called before its
            first step.
        model: A PEFT model with a plain LoRA adapter, or a module that holds one.
        config: The options; the paper's by default.
        batches: Held-out batches to measure importance on, as the model's forward takes them, with
            labels; none for a score that is gathered while training.
        num_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of one epoch, which the paper's places of rounds are
            counted in; the whole run by default.
        loss: The mean loss of a held-out batch, with its graph, where it is not the model's own.
        on_round: Called with each round once it has taken place.
        adapter_name: PEFT's name of the adapter; the active one by default.

    Returns:
        What follows: its `record` holds the rounds, its `steps` say when they are, and its
        `state_dict()` is for a checkpoint of the loop's.

    Raises:
        ValueError: The options do not fit the model, the batches or the length of the run.
        TypeError: The adapter, the optimiser or the way of running has no rank allocation.

    Example:
        >>> following = follow(optimizer, model, None, dev, num_steps=900)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> model.save_pretrained("adapter")  # doctest: +SKIP
    """
    config = config or AllocationConfig()
    if isinstance(batches, Mapping):
        raise TypeError("`batches` is a single batch; give a list of them, such as [batch].")
    _check(config, has_batches=bool(batches))
    part = adapted_part(model)
    name = active_adapter(part) if adapter_name is None else adapter_name
    method = Alora.on(part, config, adapter_name=name)
    length = Length(num_steps=num_steps, steps_per_epoch=steps_per_epoch or num_steps)
    method.wants(length)
    objective = None if is_gathered(config) else Objective(part, batches, loss=loss)
    session = Session(
        optimizer=bare_optimizer(optimizer),
        num_steps=length.num_steps,
        steps_per_epoch=length.steps_per_epoch,
        loss=_no_loss,
        objective=objective,
        on_round=on_round,
    )
    method.join(session)
    if method.record.note:
        logger.warning("loralloc: %s.", method.record.note)
    return Following(method, session)


class Following:
    """Tells an allocation of the steps that an optimiser takes. Made by `follow`."""

    def __init__(self, method: Alora, session: Session) -> None:
        """Begin; from here on the model saves itself through its method."""
        self._method, self._session = method, session
        method.begin(session)
        optimizer: Optimizer = session.optimizer
        self._hook: Any = optimizer.register_step_post_hook(self._after_step)
        self._save = {"save_pretrained": saving_with(method, self._save_model)}
        self._before = replace(method.model, self._save)

    @property
    def record(self) -> Record:
        """The rounds so far."""
        return self._method.record

    @property
    def steps(self) -> list[int]:
        """Optimiser steps after which a round takes place."""
        return self._method.steps

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimiser's own states.

        Plain data and tensors. Its "ranks" have the rank of every module, which `resize` gives to a
        model whose weights are loaded before there is an optimiser.
        """
        return {
            "ranks": self.record.ranks,
            "steps_done": self._session.steps_done,
            "record": self.record.as_data(),
            **self._method.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Call it before the states of the model and the optimiser are loaded: both get the shapes of
        the ranks that there were.

        Raises:
            ValueError: It was begun with other options, or on other modules.
        """
        self._method.take_up(Record.from_data(state["record"]), state)
        self._session.steps_done = int(state["steps_done"])
        self._hook.remove()
        self._method.begin(self._session)
        self._hook = self._session.optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Let the optimiser and the model be as they were; nothing moves any more."""
        self._hook.remove()
        self._method.release()
        give_back(self._method.model, self._save, self._before)

    def _after_step(self, *_: Any) -> None:
        number = self._session.steps_done = self._session.steps_done + 1
        self._method.step(number)
        self._method.after_step(number, number / self._session.steps_per_epoch)
        if number == self.steps[-1] and self.record.churn_note:
            logger.warning("loralloc: %s.", self.record.churn_note)

    def _save_model(self, folder: Path, options: dict[str, Any]) -> None:
        refuse_unfinished(self._method)
        self._method.save(folder, **options)


def _check(config: AllocationConfig, *, has_batches: bool) -> None:
    """Refuse what a loop of one's own cannot have.

    Raises:
        ValueError: The options want a trainer, or batches that are not there.
        TypeError: Several processes train together.
    """
    if learns_from_batches(config):
        raise ValueError(
            f"`score` is {config.score!r}, whose gates learn from training examples that the loop "
            "leaves to them; use another score, or `attach` with a Trainer."
        )
    if not has_batches and not is_gathered(config):
        raise ValueError(
            "Importance is measured on held-out batches, and there are none; give some as "
            '`batches`, or use `score="sensitivity"`, which is gathered from the training steps.'
        )
    if replicas.count() > 1:
        raise TypeError(
            f"The loop runs in {replicas.count()} processes, whose wrapper around the model has to "
            "be built again where ranks move; use `attach` with a Trainer, or start one process."
        )


def _no_loss(batch: Batch) -> Tensor:
    raise AssertionError("an allocation measures on its objective")
