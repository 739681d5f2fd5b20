import copy
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from loralloc.evaluation.generation import generate
from loralloc.evaluation.prompts import batches

PROMPTS = [
    "the film is",
    "a good story of a warm place is",
    "the",
    "the place is cold and the film is bad and " * 6 + "the story is",
    "a",
    "🎬 the film 👩‍👩‍👧 is",
    "الفيلم جيد جدا והסרט טוב",
    "two\n\nlines\tand a tab:",
]


def reference(model, tokenizer, prompt, **options):
    """What Transformers generates for one prompt, unpadded."""
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    tokens = model.generate(**inputs, generation_config=config)[0].tolist()
    answer = [*tokens[inputs["input_ids"].shape[1] :], tokenizer.eos_token_id]
    return tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)]).strip()


def ending_early(model, tokenizer):
    """The tokenizer with an end token that the model often comes to."""
    free = [
        model.generate(**_ids(tokenizer, p), max_new_tokens=8, do_sample=False)[0, -6:]
        for p in PROMPTS
    ]
    counts = Counter(torch.cat(free).tolist())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(counts.most_common(1)[0][0])
    return tokenizer


def _ids(tokenizer, prompt):
    return {"input_ids": tokenizer(prompt, return_tensors="pt")["input_ids"]}


@pytest.mark.parametrize("share_prompts", (True, False))
@pytest.mark.parametrize("num_beams", (1, 5))
@pytest.mark.parametrize("batch_size", (1, 3, 32))
def test_batches_give_what_each_prompt_alone_gives(
    batch_size, num_beams, share_prompts, model, tokenizer
):
    tokenizer = ending_early(model, tokenizer)
    options = dict(max_new_tokens=10, num_beams=num_beams)
    responses = generate(
        model, tokenizer, PROMPTS, batch_size=batch_size, share_prompts=share_prompts, **options
    )
    expected = [reference(model, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert responses == expected
    lengths = {len(tokenizer(text)["input_ids"]) for text in responses}
    assert len(lengths) > 2  # some ended early, others did not


def test_beams_read_each_prompt_once(model, tokenizer):
    rows = []
    embeddings = model.get_base_model().get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2, num_beams=5)
    handle.remove()
    longest = max(len(tokenizer(p)["input_ids"]) for p in PROMPTS[:2])
    assert rows == [(2, longest - 1), (10, 1), (10, 1)]


def test_it_is_deterministic_and_leaves_the_generators_alone(model, tokenizer):
    before = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == first


def test_a_response_ends_at_the_end_token(model, tokenizer):
    prompts = PROMPTS[:3]
    free = [
        model.generate(**_ids(tokenizer, p), max_new_tokens=8, do_sample=False) for p in prompts
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


@pytest.mark.parametrize("num_beams", (1, 5))
def test_the_models_own_options_do_not_matter(num_beams, model, tokenizer):
    options = dict(max_new_tokens=6, num_beams=num_beams)
    expected = generate(model, tokenizer, PROMPTS, **options)
    own = model.get_base_model().generation_config
    own.do_sample, own.temperature, own.max_length = True, 5.0, 3
    own.repetition_penalty, own.length_penalty, own.early_stopping = 9.0, -3.0, True
    own.suppress_tokens = list(range(40, 200))
    assert generate(model, tokenizer, PROMPTS, **options) == expected
    assert model.get_base_model().generation_config is own


@pytest.mark.parametrize("training", (True, False))
def test_the_models_mode_comes_back(training, model, tokenizer):
    model.train(training)
    frozen = next(model.children())
    frozen.eval()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert model.training is training
    assert frozen.training is False


def test_progress_is_told_after_each_batch(model, tokenizer):
    done = []
    generate(model, tokenizer, PROMPTS[:5], max_new_tokens=2, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]


def test_a_tokenizer_without_a_padding_token(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert tokenizer.pad_token is None


def test_a_tokenizer_without_an_end_token(model, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token, so no answer could end"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=6)


def test_no_prompts_no_responses(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "words"),
    [
        (["the", ""], 4, r"Prompt 2 \(''\) has no tokens; give it some text"),
        (
            ["the", "x" * 600],
            12,
            r"Prompt 2 \('x{40}'\.\.\.\) has 600 tokens, but the model's context of 512 less "
            "`max_new_tokens` of 12 leaves 500; shorten it",
        ),
        (["the"], 512, "`max_new_tokens` is 512, .* context has 512 tokens .* at most 511"),
    ],
)
def test_what_has_no_room_is_refused(prompts, max_new_tokens, words, model, tokenizer):
    with pytest.raises(ValueError, match=words):
        generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)


def test_a_prompt_that_fills_the_context_is_answered(model, tokenizer):
    assert generate(model, tokenizer, ["x" * 510], max_new_tokens=2, num_beams=2)


def test_sequences_of_like_length_go_together_and_long_ones_in_small_batches():
    lengths = [5, 40, 7, 5, 100, 6]
    assert batches(lengths, batch_size=2) == [[4, 1], [2, 5], [0, 3]]
    assert batches(lengths, batch_size=8, max_tokens=80) == [[4], [1, 2], [5, 0, 3]]
    assert batches(lengths, batch_size=8, copies=5, max_tokens=80) == [[4], [1], [2, 5], [0, 3]]
    assert batches([], batch_size=8) == []


@pytest.mark.parametrize("copies", (1, 3))
def test_no_batch_holds_more_positions_than_allowed(copies):
    lengths = torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = batches(lengths, batch_size=16, copies=copies, max_tokens=400)
    assert sorted(i for group in groups for i in group) == list(range(200))
    for group in groups:
        positions = max(lengths[i] for i in group) * copies * len(group)
        assert len(group) <= 16 and (positions <= 400 or len(group) == 1)
