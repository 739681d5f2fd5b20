import pytest
import torch
from transformers import AutoModelForCausalLM

from loralloc.evaluation.labels import encode_labels, score_labels
from loralloc.evaluation.prompts import encode

PROMPTS = [
    "the film is",
    "a",
    "the place is cold and the film is bad and " * 6 + "the story is",
    "🎬 the film 👩‍👩‍👧 is",
    "الفيلم جيد جدا והסרט טוב",
]
LABELS = ("good", "not good at all", "bad")


def reference(model, tokenizer, prompt, label):
    """One text at a time, one token after the other."""
    start = tokenizer(prompt)["input_ids"]
    whole = [*tokenizer(f"{prompt} {label}")["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for position in range(len(start), len(whole)):
        logits = model(input_ids=torch.tensor([whole[:position]])).logits[0, -1]
        total += torch.log_softmax(logits.double(), dim=-1)[whole[position]]
    return total


@pytest.mark.parametrize("share_prompts", (True, False))
@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_equals_the_sum_token_by_token(batch_size, share_prompts, model, tokenizer):
    scores = score_labels(
        model, tokenizer, PROMPTS, LABELS, batch_size=batch_size, share_prompts=share_prompts
    )
    with torch.no_grad():
        expected = torch.tensor(
            [[reference(model, tokenizer, p, label) for label in LABELS] for p in PROMPTS]
        )
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4, check_dtype=False)
    assert scores.std(dim=0).min() > 0.1  # a prompt makes a difference


def test_prompts_are_read_once_for_all_labels(model, tokenizer):
    rows = []
    embeddings = model.get_base_model().get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    score_labels(model, tokenizer, PROMPTS[:2], LABELS)
    handle.remove()
    longest = len(tokenizer(PROMPTS[0])["input_ids"])
    label = max(len(ids) for ids in encode_labels(tokenizer, PROMPTS[:1], LABELS)[0])
    assert rows == [(2, longest - 1), (6, label)]


def test_scores_are_float32_of_a_model_below(llama_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    scores = score_labels(model, tokenizer, PROMPTS, LABELS)
    exact = score_labels(model.float(), tokenizer, PROMPTS, LABELS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0.02, atol=0.2)


def test_a_small_bound_on_positions_changes_nothing(model, tokenizer):
    done = []
    scores = score_labels(
        model, tokenizer, PROMPTS, LABELS, max_batch_tokens=100, on_batch=done.append
    )
    assert len(done) > 1 and done[-1] == len(PROMPTS)
    torch.testing.assert_close(scores, score_labels(model, tokenizer, PROMPTS, LABELS))


def test_no_prompts_no_scores(model, tokenizer):
    assert score_labels(model, tokenizer, [], LABELS).shape == (0, 3)


def test_labels_end_with_the_end_token(tokenizer):
    [[good, longer, _]] = encode_labels(tokenizer, PROMPTS[:1], LABELS)
    assert good[-1] == longer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(longer[:-1]) == " not good at all"


def test_a_tokenizer_that_merges_prompt_and_label_is_refused(tokenizer):
    """As one would whose words may hold blanks."""
    real = tokenizer.__call__

    class Merging:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            return real(text.replace("film is good", "film"), **options)

    with pytest.raises(ValueError, match="merges the label 'good' with the end of the prompt"):
        encode_labels(Merging(), ["the film is"], LABELS)


def test_a_tokenizer_without_an_end_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token, so no answer could end"):
        encode_labels(tokenizer, PROMPTS, LABELS)


def test_a_long_prompt_is_cut_at_its_beginning_where_that_is_allowed(model, tokenizer):
    long = "y" * 600 + " the film is"
    token_ids, cut = encode(model, tokenizer, ["the", long], max_new_tokens=12, truncate=True)
    assert cut == [1]
    assert len(token_ids[1]) == 500
    assert token_ids[1] == tokenizer(long)["input_ids"][-500:]
    assert token_ids[0] == tokenizer("the")["input_ids"]
