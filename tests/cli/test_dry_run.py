"""`loralloc train --dry-run` says what would happen, and does nothing."""

import re

import pytest

from loralloc import prepare


@pytest.fixture
def rows_of(train):
    """The lines of a dry run by their first word or words."""

    def rows(*flags, **changes):
        answer = train("--dry-run", *flags, **changes)
        assert (answer.code, answer.err) == (0, "")
        lines = [re.split(r"\s{2,}", line.strip()) for line in answer.out.splitlines()]
        return {line[0].removeprefix("* "): line[1:] for line in lines if len(line) > 1}

    return rows


def test_settings_come_with_their_source(rows_of, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora_alpha: 4\nlearning_rate: 1e-3\nallocation:\n  grace_rounds: 1\n")
    rows = rows_of("--config", path, "--lora_r", "4", learning_rate="2e-3")
    assert rows["lora_r"] == ["4", "flag"]
    assert rows["learning_rate"] == ["0.002", "flag"]
    assert rows["lora_alpha"] == ["4", f"file {path}"]
    assert rows["allocation.grace_rounds"] == ["1", f"file {path}"]
    assert rows["allocation.num_rounds"] == ["2", "flag"]
    assert rows["allocation.score"] == ["gradient", "loralloc default"]
    assert rows["allocation.seed"] == ["42 (the run's)", "loralloc default"]
    assert rows["weight_decay" if "weight_decay" in rows else "lora_dropout"][1]
    assert rows["lora_target_modules"][1] == "every linear of a block"


def test_the_type_that_was_detected_is_shown(rows_of):
    assert re.fullmatch(r"(bfloat16|float32) \(detected\)", rows_of(dtype=None)["dtype"][0])


def test_the_plan(rows_of):
    rows = rows_of()
    assert rows["data"] == ["train 24, validation 8 examples (lm head)"]
    assert rows["adapted modules"][0].startswith("14: q_proj x2, k_proj x2, v_proj x2, o_proj x2")
    assert rows["ranks"] == ["28, 7 ranks a round"]
    assert re.match(r"2,048 trainable of [\d,]+", rows["parameters"][0])
    assert rows["budget"] == ["2,048 parameters, which it ends with"]
    assert rows["steps"] == ["12, 6 an epoch"]
    assert rows["rounds"] == ["after steps 3, 6"]


def test_what_shrinking_ends_with_is_not_known_before(rows_of):
    rows = rows_of(method="shrink", warmup_epochs=None, recovery_epochs=None)
    assert rows["budget"] == ["2,048 parameters at the start; how many at the end is what it finds"]


def test_an_optimiser_that_the_run_would_refuse_is_refused(train):
    sentence = train("--dry-run", optim="adafactor").sentence
    assert "Adafactor keeps `exp_avg_sq_row` of every parameter" in sentence


def test_a_search_is_told_with_its_steps_and_those_that_train_what_it_finds(rows_of):
    allocation = ("num_rounds", "warmup_epochs", "recovery_epochs", "scoring_examples")
    rows = rows_of(method="ssp", **dict.fromkeys(allocation))
    assert rows["steps"] == ["12, 6 an epoch"]
    assert rows["search"] == ["3 steps on top, before the 12 that train what was found"]


def test_when_a_run_is_evaluated(rows_of):
    rows = rows_of()
    assert rows["evaluation"] == ["development loss after every epoch"]
    assert "checkpoint kept" not in rows and "early stopping" not in rows


def test_the_papers_protocol_is_told_in_words(rows_of):
    rows = rows_of("--protocol", "paper", gradient_accumulation_steps=1)
    why = "protocol paper: twice an epoch, not every 200: under 2,000 in all"
    assert rows["eval_steps"] == ["3", why]
    assert rows["early_stopping_patience"] == ["10", "protocol paper"]
    assert rows["evaluation"] == [f"development loss every 3 steps and after the last ({why})"]
    start = "step 6 (the last round)"
    assert rows["checkpoint kept"] == [f"the one with the lowest development loss, from {start} on"]
    assert rows["early stopping"] == [f"after 10 evaluations without a better one since {start}"]


def test_another_measure_and_a_share_of_the_run(rows_of):
    rows = rows_of(
        eval_strategy="steps",
        eval_steps=0.2,
        load_best_model_at_end="true",
        metric_for_best_model="mean_token_accuracy",
    )
    assert rows["evaluation"] == ["development loss every 3 steps and after the last (flag)"]
    assert rows["checkpoint kept"][0].startswith("the one with the best mean_token_accuracy")


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        (dict(score="gradient"), "about 4 forward passes"),
        (dict(score="ablation"), "about 28 forward passes"),
        (dict(score="screened", verify_ranks=10), "to 14 forward passes"),
        (dict(newborns="potential", new_rows="gradient"), "and 10 for new ranks"),
    ],
)
def test_the_cost_of_scoring_against_the_papers(changes, cost, rows_of):
    (shown,) = rows_of(**changes)["scoring a round"]
    assert cost in shown
    assert "the paper's 2R: 56" in shown


@pytest.mark.parametrize("score", ["sensitivity", "architecture"])
def test_scores_gathered_while_training_cost_no_scoring(score, rows_of):
    rows = rows_of(score=score)
    assert rows["scoring a round"][0].startswith("none: ")
    assert rows["allocation.score"] == [score, "flag"]


def test_rounds_that_are_spread_are_said_to_be(rows_of):
    (shown,) = rows_of(num_rounds=5)["rounds"]
    assert shown == (
        "after steps 1, 7 (5 rounds need more than 2.5 epochs and the run has 2: 2 of them are "
        "spread over steps 1 to 7)"
    )


def test_a_run_of_so_many_steps_has_no_epochs_to_show(rows_of):
    assert rows_of()["num_train_epochs"] == ["2.0", "flag"]
    rows = rows_of(max_steps=4, num_train_epochs=None)
    assert rows["steps"] == ["4, 6 an epoch"] and "num_train_epochs" not in rows
    assert rows["rounds"][0].startswith("after step 1 (")


def test_the_cost_of_a_score_of_ones_own_is_not_known(rows_of):
    place = "loralloc.allocation.importance.gradient:score"
    rows = rows_of(score=place)
    assert rows["scoring a round"] == ["not known: the score is your own"]
    assert rows["allocation.score"] == [place, "flag"]


def test_a_round_never_costs_more_than_verifying_every_rank(rows_of):
    (shown,) = rows_of()["scoring a round"]
    most = int(re.search(r"(\d+) forward passes", shown).group(1))
    assert most <= 4 + 28


def test_nothing_is_written(train, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert train("--dry-run").code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_a_run_may_be_planned_for(train, output):
    from loralloc.runs.folder import claim

    claim(output)
    assert train("--dry-run").code == 0


def test_a_classification_run(rows_of, data, write_rows, bert_folder):
    for split, count in (("train", 24), ("validation", 8)):
        rows = [{"sentence": "the film is good", "label": number % 2} for number in range(count)]
        write_rows(data / f"{split}.jsonl", rows)
    rows = rows_of(task="sst2", model_name_or_path=bert_folder)
    assert rows["data"] == ["train 24, validation 8 examples (classification head)"]
    assert rows["adapted modules"][0].startswith("12: query x2, key x2, value x2")


@pytest.mark.parametrize("changes", (dict(max_steps=1), dict(min_rank=3)))
def test_what_training_would_refuse_is_refused(changes, train, output):
    assert train("--dry-run", **changes).sentence


def test_what_was_given_is_marked_and_what_cannot_act_is_left_out(train):
    given = ("--save_strategy", "no", "--eval_strategy", "no")
    out = train("--dry-run", *given).out
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    names = [line[0] for line in lines]
    groups = [names.index(name) for name in ("data", "model and method", "training", "allocation")]
    assert groups == sorted(groups)
    assert "* lora_r" in names[groups[1] : groups[2]]
    assert "* learning_rate" in names[groups[2] : groups[3]]
    assert "lora_alpha" in names and "* lora_alpha" not in names
    for idle in ("save_total_limit", "allocation.shapley_nodes", "allocation.gate_lr"):
        assert idle not in names
    assert "allocation.shapley_nodes" in train("--dry-run", score="shapley").out


def test_time_and_memory_come_from_a_few_batches(rows_of):
    (words,) = rows_of(gradient_accumulation_steps=2)["takes"]
    pattern = (
        r"about (\d+) s for the steps \((\S+) s each, from 3 batches\), with rounds.*; (\S+) GiB"
    )
    total, step, memory = map(float, re.match(pattern, words).groups())
    assert abs(total - 6 * step) <= 1 and 0.05 < memory < 64


def test_no_name_or_word_is_broken_at_80_columns(train, monkeypatch):
    wide = train("--dry-run").out.split()
    monkeypatch.setenv("COLUMNS", "80")
    narrow = train("--dry-run").out
    assert max(map(len, narrow.splitlines())) <= 80
    # Paths are longer than a column, and the time differs.
    exempt = re.compile(r"/|^\(?\d")
    words = {word for word in wide if not exempt.search(word)}
    assert words <= set(narrow.split())


def test_no_folder_is_left_not_even_those_above_a_runs(llama_folder, write_rows, tmp_path):
    rows = [{"text": f"the film {number} is good"} for number in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"dataset_name": str(data), "model_name_or_path": str(llama_folder)}
    folder = str(tmp_path / "runs" / "mine" / "first")
    prepare({**options, "output_dir": folder, "use_cpu": True, "validation_examples": 8})
    assert not (tmp_path / "runs").exists()
