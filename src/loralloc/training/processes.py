"""Several processes that train one model: the wrapper around it, and what its method holds beside.

PyTorch's wrapper averages the gradients of the parameters that it was built with. One that takes
another's place later would train on its own process's examples alone, and nothing would tell. So
the wrapper is built again, in place: whoever holds it goes on with the same object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.optimizer_state import bare_optimizer
from loralloc.methods.method import Method, trainable
from loralloc.training.way_of_running import acts_between_steps


class Processes:
    """Keeps the processes of a trainer together while a method acts on its model.

    In one process nothing happens.

    Args:
        trainer: Its model is the method's.
        method: Already has its model.
    """

    def __init__(self, trainer: Trainer, method: Method) -> None:
        self._trainer, self._method = trainer, method
        self._known: list[int] = []

    def begin(self) -> None:
        """Let all begin from the same, before the first step and once the optimiser is there."""
        if replicas.count() == 1:
            return
        replicas.share(self._method.beside().values())
        self._known = self._trained()
        rewrap(self._trainer)  # a method may have begun with other parameters
        if acts_between_steps(self._method):
            self._check("At the beginning")

    def end(self) -> None:
        """Compare once more, where the method may have changed values in place."""
        if replicas.count() > 1 and acts_between_steps(self._method):
            self._check("At the end of training")

    def average(self) -> None:
        """Average the gradients of what trains beside the model, before the method's own step."""
        replicas.average_gradients(list(self._method.beside().values()))

    def follow(self, step: int, *, has_changed: bool) -> None:
        """Go on with the parameters that there are now, once they are the same in all processes.

        Args:
            step: Optimiser steps so far, for the message.
            has_changed: Whether the method says that the model has become another.
        """
        if replicas.count() == 1:
            return
        trained = self._trained()
        if trained != self._known:
            self._known = trained
            rewrap(self._trainer)
            has_changed = True
        if has_changed:
            self._check(f"After step {step}")

    def _trained(self) -> list[int]:
        """What the optimiser trains; a new parameter is new there too."""
        optimizer: Any = bare_optimizer(self._trainer.optimizer)
        return [id(p) for group in optimizer.param_groups for p in group["params"]]

    def _check(self, when: str) -> None:
        tensors: Mapping[str, Tensor] = {
            **trainable(self._method.model),
            **self._method.beside(),
        }
        replicas.check_equal(tensors, bare_optimizer(self._trainer.optimizer), when=when)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler of a loader which epoch begins, however deep it lies.

    Of a run that goes on within an epoch, Accelerate puts what skips batches around what shares
    them out, and the epoch does not reach the sampler: it would begin the first epoch's order anew.

    Args:
        loader: Of the training examples.
        epoch: Counted from 0.
    """
    part = getattr(loader, "batch_sampler", None)
    while part is not None:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)


def rewrap(trainer: Trainer) -> None:
    """Let the wrapper of a trainer's model know the parameters that the model has now.

    To be called in all processes, between two steps.

    Args:
        trainer: Its `model_wrapped` may be compiled. Nothing happens where no wrapper is in it.
    """
    if trainer.is_distributed_loading_by_transformers:
        trainer._sync_replicated_trainable_parameters(trainer.model)
    for wrapper in _wrappers(trainer.model_wrapped):
        _build_again(wrapper)


def _wrappers(model: Any) -> Iterator[DistributedDataParallel]:
    while isinstance(model, nn.Module):
        if isinstance(model, DistributedDataParallel):
            yield model
        model = model._modules.get("_orig_mod") or model._modules.get("module")


def _build_again(ddp: Any) -> None:
    hooks = list(ddp._comm_hooks)
    buffers, is_training = ddp.broadcast_buffers, ddp.training
    size = None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / 2**20
    ddp.__init__(
        ddp.module,
        device_ids=ddp.device_ids,
        output_device=ddp.output_device,
        dim=ddp.dim,
        process_group=ddp.process_group,
        bucket_cap_mb=size,
        find_unused_parameters=ddp.find_unused_parameters,
        gradient_as_bucket_view=ddp.gradient_as_bucket_view,
        static_graph=ddp.static_graph,
        # The backbone is not sent about again; that replicas are equal is checked by itself.
        init_sync=False,
    )
    ddp.broadcast_buffers, ddp.training = buffers, is_training
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
