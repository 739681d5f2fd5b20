import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralloc.evaluation.generation import generate

PROMPTS = [
    "the film is",
    "a good story of a warm place is",
    "the",
    "the place is cold and the film is bad and",
    "a",
]


@pytest.fixture
def model(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)


@pytest.fixture
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


def reference(model, tokenizer, prompt, **options):
    """What Transformers generates for one prompt, unpadded."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        **inputs, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options
    )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("num_beams", (1, 3))
@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_batches_give_what_each_prompt_alone_gives(batch_size, num_beams, model, tokenizer):
    responses = generate(
        model, tokenizer, PROMPTS, max_new_tokens=12, num_beams=num_beams, batch_size=batch_size
    )
    expected = [
        reference(model, tokenizer, prompt, max_new_tokens=12, num_beams=num_beams)
        for prompt in PROMPTS
    ]
    assert responses == expected
    assert len(set(responses)) > 1


def test_it_is_deterministic_and_leaves_the_generators_alone(model, tokenizer):
    before = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == first


def test_a_response_ends_at_the_end_token(model, tokenizer):
    prompts = PROMPTS[:3]
    free = [
        model.generate(**tokenizer(p, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        for p in prompts
    ]
    tokenizer = copy.deepcopy(tokenizer)
    fourth = int(free[0][0, len(tokenizer(prompts[0])["input_ids"]) + 3])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(fourth)
    alone, together = (
        generate(model, tokenizer, chosen, max_new_tokens=8)[0] for chosen in (prompts[:1], prompts)
    )
    whole = tokenizer.decode(free[0][0, len(tokenizer(prompts[0])["input_ids"]) :])
    assert alone == together
    assert whole.strip().startswith(alone) and len(alone) < len(whole.strip())


def test_the_models_own_sampling_options_do_not_matter(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.max_length = 3
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


@pytest.mark.parametrize("training", (True, False))
def test_the_models_mode_comes_back(training, model, tokenizer):
    model.train(training)
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert model.training is training


def test_progress_is_told_after_each_batch(model, tokenizer):
    done = []
    generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]


def test_a_tokenizer_without_a_padding_token(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_no_prompts_no_responses(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=2) == []
