import pytest

from loralloc.evaluation.generation import generate
from loralloc.runs.trained import load_trained
from loralloc.tasks.conversations import Common


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


def chat(question, *, system=None, answer="good"):
    messages = [{"role": "system", "content": system}] if system else []
    said = {"role": "assistant", "content": answer}
    return {"messages": [*messages, {"role": "user", "content": question}, said]}


@pytest.fixture
def conversed(call, tmp_path, output, llama_folder, write_rows):
    """A run on conversations with one system message."""
    rows = [chat(f"is film {i} good?", system="Be brief.") for i in range(12)]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    words = ("--dataset_name", data, "--model_name_or_path", llama_folder, "--output_dir", output)
    short = ("--method", "lora", "--max_steps", "2", "--validation_examples", "4")
    assert call("train", *words, *short, "--dtype", "float32").code == 0
    return output


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], Common(system="Be brief.").ask("the film")),
        (["--base"], Common(system="Be brief.").ask("the film")),
        (["--system", "Be long."], Common(system="Be long.").ask("the film")),
        (["--raw"], "the film"),
    ],
)
def test_a_run_on_conversations_is_asked_in_one(flags, expected, conversed, call, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return ["yes"] * len(prompts)

    monkeypatch.setattr("loralloc.evaluation.generation.generate", generate)
    assert call("generate", conversed, "--prompt", "the film", *flags).out == "yes\n"
    assert asked == [expected]


def test_a_run_on_texts_is_asked_as_it_is(finished, call, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "loralloc.evaluation.generation.generate", lambda *args, **_: asked.extend(args[2]) or []
    )
    call("generate", finished, "--prompt", "the film")
    assert asked == ["the film"]


def test_a_system_message_without_a_conversation_is_refused(finished, call):
    words = ("generate", finished, "--prompt", "the film", "--system", "x")
    assert f"the run in {finished} was not trained on conversations" in call(*words).sentence
    assert "`--raw` sends prompts as they are" in call(*words, "--raw").sentence


def test_what_an_overwritten_run_was_asked_by_is_gone(conversed, train, output):
    assert (output / "conversation.json").is_file()
    assert train("--overwrite").code == 0
    assert not (output / "conversation.json").exists()
