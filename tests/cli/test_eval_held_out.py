"""`loralloc eval` on a run that has no task: loss, accuracy and perplexity on held-out rows."""

import json
import math

import pytest
import torch

from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.trained import load_trained


def figures(answer):
    assert (answer.code, answer.err) == (0, "")
    lines = [line.split() for line in answer.out.splitlines()]
    return {line[0]: line[-1] if line[0] == "token" else line[1] for line in lines}


def reference(folder, rows, *, with_adapter=True):
    """Cross-entropy and accuracy over the completions' tokens, a row at a time."""
    model, tokenizer = load_trained(folder, with_adapter=with_adapter)
    model.eval()
    losses, right = [], []
    for row in rows:
        start = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(dim=-1)
        for place in range(len(start) - 1, len(ids) - 1):
            losses.append(-logits[place, ids[place + 1]].item())
            right.append(logits[place].argmax().item() == ids[place + 1])
    return losses, right


@pytest.fixture
def finished(train, output):
    assert train().code == 0
    return output


@pytest.mark.parametrize("base", (False, True))
def test_a_language_models_figures_are_means_over_supervised_tokens(base, finished, data, call):
    answer = call("eval", finished, *(["--base"] if base else []))
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    losses, right = reference(finished, rows, with_adapter=not base)
    loss = sum(losses) / len(losses)
    folder = finished / "eval" / ("held-out-validation" + ("-base" if base else ""))
    result = json.loads((folder / "eval.json").read_text())
    assert result["loss"] == pytest.approx(loss, rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (result["num_examples"], result["num_targets"]) == (8, len(losses))
    assert figures(answer)["perplexity"] == f"{result['perplexity']:.2f}"
    assert f"token accuracy  {result['accuracy']:.4f}" in answer.out
    assert f"perplexity      {result['perplexity']:.2f}" in answer.out


def test_rows_that_the_run_held_out_are_found_again(train, output, data, call):
    (data / "validation.jsonl").unlink()
    assert train(validation_examples=6).code == 0
    answer = call("eval", output)
    assert answer.out.startswith("validation: 6 examples, ")
    assert "6 rows held out of" in answer.out
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    development = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert float(figures(answer)["loss"]) == pytest.approx(development, rel=0.05)


def test_another_file_and_fewer_rows(finished, data, call, write_rows, tmp_path):
    path = write_rows(tmp_path / "more.jsonl", [{"prompt": "a film is", "completion": " good"}] * 3)
    assert call("eval", finished, "--data", path).out.startswith("train: 3 examples, ")
    assert call("eval", finished, "--limit", 2).out.startswith("validation: 2 of 8 examples, ")
    said = call("eval", finished, "--split", "test").sentence
    assert said == "The data has no test split, only train, validation; name one."


def test_a_classifier_has_accuracy_and_no_perplexity(
    train, output, data, write_rows, bert_folder, call
):
    texts = ("the film is good", "a bad story", "the place is warm")
    rows = [{"text": texts[n % 3], "label": ("calm", "loud", "odd")[n % 3]} for n in range(24)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "validation.jsonl", rows[:7])
    assert train(model_name_or_path=bert_folder).code == 0
    answer = call("eval", output)
    model, tokenizer = load_trained(output, head=CLASSIFICATION)
    losses, right = [], []
    for row in rows[:7]:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        label = ("calm", "loud", "odd").index(row["label"])
        losses.append(-logits.log_softmax(dim=-1)[label].item())
        right.append(int(logits.argmax()) == label)
    result = json.loads((output / "eval" / "held-out-validation" / "eval.json").read_text())
    assert result["loss"] == pytest.approx(sum(losses) / 7, rel=1e-4)
    assert result["accuracy"] == pytest.approx(sum(right) / 7)
    assert "perplexity" not in answer.out and "7 labels" in answer.out
    # Other data may lack a label, or have one that the run does not know.
    path = write_rows(data / "test.jsonl", [rows[2], rows[1]])
    again = call("eval", output, "--data", path)
    assert float(figures(again)["loss"]) == pytest.approx((losses[2] + losses[1]) / 2, rel=1e-3)
    path = write_rows(data / "test.jsonl", [rows[2], {"text": "warm", "label": "new"}])
    sentence = call("eval", output, "--data", path).sentence
    assert "Row 2 of" in sentence and "one of 'calm', 'loud', 'odd' and is 'new'" in sentence
    one = call("eval", output, "--data", write_rows(data / "test.jsonl", [rows[2]]))
    assert float(figures(one)["loss"]) == pytest.approx(losses[2], rel=1e-3)
    # A split that cannot be read is in nobody's way.
    write_rows(data / "test.jsonl", [{"text": "warm"}])
    assert call("eval", output, "--split", "validation").out.startswith("validation: 7 examples")


def test_a_split_by_its_own_name_of_a_language_model(finished, data, call, write_rows):
    row = {"prompt": "a film is", "completion": " good"}
    write_rows(data / "more.jsonl", [row] * 3)
    assert call("eval", finished, "--split", "more").out.startswith("more: 3 examples, ")


def test_the_runs_text_field_is_read_in_other_data_too(train, output, data, call, write_rows):
    rows = [{"body": f"the film {number} is good"} for number in range(24)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "validation.jsonl", rows[:8])
    assert train(dataset_text_field="body").code == 0
    path = write_rows(data.parent / "other.jsonl", rows[:3])
    assert call("eval", output, "--data", path).out.startswith("train: 3 examples, ")


def test_results_of_another_kind_are_not_replaced(finished, call, tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    (out / "eval.json").write_text('{"settings": {}, "figures": []}')
    sentence = call("eval", finished, "--output_dir", out).sentence
    assert "holds the evaluation of a task, which this one would replace" in sentence


def test_how_a_model_answers_is_no_matter_of_its_loss(finished, call):
    assert (
        "`--decode` is for answers to a task" in call("eval", finished, "--decode", "beam").sentence
    )
