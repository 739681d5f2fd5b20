"""A method driven by hand, as a run drives it, on tiny models and without a trainer."""

import numpy as np
import tiny
import torch
from peft import TaskType

from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.objective import Objective
from loralloc.methods.method import Length, Method, Session

BUILDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "roberta": tiny.roberta_classifier}
"""Backbones of the three shapes that every method knows."""

STEPS = 40


def task_type(model) -> TaskType:
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    return TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM


def prepared(method: Method, model, budget: int = 3000):
    """The method, sized and prepared; its model, in training mode. A classifier's head trains."""
    heads = ("classifier",) if task_type(model) == TaskType.SEQ_CLS else ()
    with tiny.seeded(3):
        method.fit(model, budget)
        method.prepare(model, task_type=task_type(model), heads=heads)
    method.model.train()
    return method


def learnable(model):
    """One batch whose answers follow from what is read, and another of the same kind."""
    return tiny.batch_for(model, num_examples=8, seed=5), tiny.batch_for(
        model, num_examples=8, seed=6
    )


def products(method) -> dict[str, np.ndarray]:
    """s B A of every module."""
    layers = lora_layers(method.model)
    scale = next(iter(layers.values())).scaling["default"]
    return {
        name: scale * (b @ a).detach().double().numpy()
        for name, (a, b) in weights_ab(layers).items()
    }


class Drive:
    """The training loop: the calls and their order are those of a run."""

    def __init__(self, method: Method, *, num_steps: int = STEPS, lr: float = 1e-2):
        self.method, self.done = method, 0
        self.batch, other = learnable(_inner(method.model))
        self.lr = lr
        length = Length(num_steps=num_steps, steps_per_epoch=max(num_steps // 4, 1))
        wants = method.wants(length)
        self.num_steps = num_steps + wants.on_top
        self.session = Session(
            num_steps=self.num_steps,
            search_steps=wants.on_top,
            steps_per_epoch=length.steps_per_epoch,
            loss=self.loss_of,
            training=lambda num_examples: tiny.micro_batches(other, 4),
            second_half=iter([other] * 1000),
            objective=Objective(method.model, tiny.micro_batches(other, 4))
            if wants.held_out
            else None,
            seed=0,
        )
        method.join(self.session)

    def loss_of(self, batch):
        self.method.watch(batch)
        return self.method.model(**batch).loss

    def begin(self, *, moments=None):
        """Begin, at step `done`, with an optimiser as it was after it."""
        self.optimizer = self.session.optimizer = tiny.optimizer_for(self.method.model, lr=self.lr)
        self.method.arrange(self.optimizer)
        if moments is not None:
            self.optimizer.load_state_dict(moments)
        self.session.steps_done = self.done
        self.method.begin(self.session)
        return self

    def train(self, until: int | None = None) -> list[float]:
        """The plain losses, step by step."""
        losses = []
        while self.done < (self.num_steps if until is None else until):
            self.method.before_step()
            loss = self.loss_of(self.batch)
            losses.append(loss.item())
            extra = self.method.extra_loss()
            (loss if extra is None else loss + extra).backward()
            self.optimizer.step()
            self.done = self.session.steps_done = self.done + 1
            self.method.step(self.done)
            self.optimizer.zero_grad()
            self.method.after_step(self.done, self.done / self.session.steps_per_epoch)
        return losses


def _inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def logits(method: Method, batch) -> torch.Tensor:
    """What the model computes in evaluation mode, at positions that are read."""
    model = method.model
    was = model.training
    model.eval()
    method.watch(batch)
    found = model(**batch).logits
    model.train(was)
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found
