"""The singular form of an adapter: the same function, and an optimiser that goes on with it."""

import numpy as np
import pytest
import tiny
import torch
from in_8_bits import QMAP, QMAP_UNSIGNED, Adam8Bit, dequantised
from reference.singular import followed, followed_columns
from reference.truncated import singular_values

from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.singular import take_singular_form


def trained(optimizer_of=torch.optim.AdamW, **options):
    """A tiny adapter after three steps, with its optimiser."""
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    weights = [w for pair in weights_ab(lora_layers(model)).values() for w in pair]
    optimizer = optimizer_of(weights, lr=1e-2, **options)
    for _ in range(3):
        gradients(model)
        optimizer.step()
    return model, optimizer


def gradients(model):
    model.zero_grad()
    model(**tiny.causal_batch()).loss.backward()


def copied(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: tuple(w.detach().double().numpy().copy() for w in pair)
        for name, pair in weights_ab(lora_layers(model)).items()
    }


def test_the_function_stays_and_the_ranks_are_singular_directions():
    model, _ = trained()
    batch, before = tiny.causal_batch(), copied(model)
    with torch.no_grad():
        expected = model(**batch).logits
        take_singular_form(model)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    for name, (a, b) in copied(model).items():
        old_a, old_b = before[name]
        np.testing.assert_allclose(b @ a, old_b @ old_a, atol=1e-6)
        lengths = np.linalg.norm(a, axis=1)
        np.testing.assert_allclose(lengths, np.sqrt((old_a**2).sum() / len(a)), rtol=1e-5)
        values = np.linalg.norm(b, axis=0) * lengths
        np.testing.assert_allclose(values, singular_values(old_b @ old_a)[: len(a)], atol=1e-6)
        for form in (a @ a.T, b.T @ b):
            np.testing.assert_allclose(form, np.diag(np.diag(form)), atol=1e-6)


def test_the_gradient_that_was_kept_is_the_gradient_of_the_new_weights():
    model, optimizer = trained(torch.optim.SGD, momentum=1e-12)
    gradients(model)
    for pair in weights_ab(lora_layers(model)).values():
        for weight in pair:
            optimizer.state[weight]["momentum_buffer"].copy_(weight.grad)
    take_singular_form(model, optimizer)
    gradients(model)
    for pair in weights_ab(lora_layers(model)).values():
        for weight in pair:
            kept = optimizer.state[weight]["momentum_buffer"]
            torch.testing.assert_close(kept, weight.grad, atol=1e-6, rtol=1e-3)


def test_means_of_gradients_and_of_squares_follow_as_the_reference_says():
    model, optimizer = trained()
    before, layers = copied(model), lora_layers(model)
    kept = {
        name: [{k: optimizer.state[w][k].double().numpy().copy() for k in KEYS} for w in pair]
        for name, pair in weights_ab(layers).items()
    }
    take_singular_form(model, optimizer)
    after = copied(model)
    for name, pair in weights_ab(layers).items():
        old, new = before[name][0], after[name][0]
        for key, power in KEYS.items():
            of_a, of_b = (optimizer.state[w][key].double().numpy() for w in pair)
            for found, reference, state in (
                (of_a, followed, kept[name][0]),
                (of_b, followed_columns, kept[name][1]),
            ):
                expected = reference(old, new, state[key], power)
                np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * expected.max())
            assert {float(optimizer.state[w]["step"]) for w in pair} == {3}


KEYS = {"exp_avg": 1, "exp_avg_sq": 2}


def test_state_in_8_bits_follows_to_a_step_of_its_scale():
    model, optimizer = trained(Adam8Bit)
    name, (a, _b) = next(iter(weights_ab(lora_layers(model)).items()))
    before = copied(model)[name][0]
    kept = [dequantised(optimizer.state[a], number).double().numpy() for number in (1, 2)]
    take_singular_form(model, optimizer)
    after = copied(model)[name][0]
    for number, qmap in ((1, QMAP), (2, QMAP_UNSIGNED)):
        expected = followed(before, after, kept[number - 1], number)
        coarse = float((qmap[1:256] - qmap[:255]).abs().max()) * np.abs(expected).max()
        found = dequantised(optimizer.state[a], number).double().numpy()
        np.testing.assert_allclose(found, expected, atol=coarse)
        assert found.any()


def test_a_module_that_has_learnt_nothing_yet_stays_at_zero():
    model = tiny.adapted(tiny.llama())
    take_singular_form(model)
    for a, b in copied(model).values():
        assert not b.any() and np.isfinite(a).all() and np.linalg.norm(a, axis=1).min() > 0


def test_training_goes_on_as_it_would_have():
    """One more step changes the product almost as it would have in the form that was trained."""
    moved = {}
    for turns in (False, True):
        model, optimizer = trained()
        if turns:
            take_singular_form(model, optimizer)
        before = {name: b @ a for name, (a, b) in copied(model).items()}
        gradients(model)
        optimizer.step()
        moved[turns] = np.concatenate(
            [(b @ a - before[name]).ravel() for name, (a, b) in copied(model).items()]
        )
    cosine = moved[True] @ moved[False] / np.linalg.norm(moved[True]) / np.linalg.norm(moved[False])
    assert cosine > 0.7
    assert np.linalg.norm(moved[True]) == pytest.approx(np.linalg.norm(moved[False]), rel=0.5)
