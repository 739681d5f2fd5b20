import pytest

from loralloc.evaluation.generation import generate
from loralloc.runs.trained import load_trained


@pytest.fixture
def finished(train, output):
    assert train(learning_rate=0.1).code == 0
    return output


def test_a_finished_run_answers_each_prompt(finished, call):
    prompts = ["the film 1 is", "the film 2 is"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    answer = call("generate", finished, *words, "--max_new_tokens", 5)
    assert (answer.code, answer.err) == (0, "")
    model, tokenizer = load_trained(finished)
    expected = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert answer.out == "".join(text + "\n" for text in expected)


def test_the_base_model_answers_for_comparison(finished, call):
    words = ["generate", finished, "--prompt", "the film 1 is", "--max_new_tokens", 5]
    assert call(*words).out != call(*words, "--base").out


def test_beams(finished, call):
    answer = call("generate", finished, "--prompt", "the", "--num_beams", 2)
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("prompt", ("[bold]the[/] film", "", "   "))
def test_any_text_is_a_prompt_or_refused_in_a_sentence(prompt, finished, call):
    answer = call("generate", finished, "--prompt", prompt, "--max_new_tokens", 2)
    assert answer.code == 0 or answer.sentence


def test_an_answer_is_not_read_as_markup(finished, call, monkeypatch):
    text = "[bold]a[/] \\[b] :smile: " + "long " * 100
    monkeypatch.setattr("loralloc.evaluation.generation.generate", lambda *_, **__: [text])
    monkeypatch.setenv("COLUMNS", "40")
    assert call("generate", finished, "--prompt", "the").out == text + "\n"


@pytest.mark.parametrize("flag", ("--max_new_tokens", "--num_beams"))
def test_numbers_below_one(flag, call, tmp_path):
    sentence = call("generate", tmp_path, "--prompt", "the", flag, 0).sentence
    assert f"`{flag}` is 0; it must be at least 1" in sentence


def test_a_folder_without_a_run(call, tmp_path):
    sentence = call("generate", tmp_path, "--prompt", "the").sentence
    assert "holds no adapter_config.json and no method.json, so no trained" in sentence
