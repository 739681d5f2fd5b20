"""Bad input gets one sentence, exit code 2, and loses nothing (the list of the project's issue)."""

import shutil

import pytest

from loralloc.cli import main

PROMPT = {"prompt": "the film is", "completion": " good"}


@pytest.fixture
def refused(train, output, tmp_path):
    """The sentence that a run is refused with, once it is known that nothing was written."""

    def refused(*flags, **changes) -> str:
        before = sorted(tmp_path.rglob("*"))
        sentence = train(*flags, **changes).sentence
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    return refused


@pytest.mark.parametrize(
    ("targets", "nearest"),
    [(["q_porj", "v_proj"], "'q_proj'"), (["q_porj"], "'q_proj'"), (["up_prj"], "'up_proj'")],
)
def test_target_modules_that_match_nothing(targets, nearest, refused):
    sentence = refused("--lora_target_modules", *targets)
    assert f"names {targets[0]!r}, which matches no module" in sentence
    assert "did you mean" in sentence and nearest in sentence


@pytest.mark.parametrize("targets", (["q_proj,v_proj"], ["q_proj,", "v_proj"], ["q_proj, v_proj"]))
def test_target_modules_with_commas(targets, refused):
    sentence = refused("--lora_target_modules", *targets)
    assert f"names {targets[0]!r}, and commas separate nothing there" in sentence
    assert sentence.endswith(": q_proj v_proj." if len(targets) == 1 else ": q_proj.")


def test_a_budget_smaller_than_min_rank_allows(refused):
    sentence = refused(min_rank=3)
    assert "The budget is 28 ranks" in sentence
    assert "`min_rank` of 3 on 14 modules needs 42" in sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_steps=1), "The run has 1 step, and a round of allocation takes place before"),
        (dict(rounds_at="[12]"), "`num_rounds` is 2, but `rounds_at` says where the 1 rounds take"),
    ],
)
def test_rounds_that_have_no_place(changes, words, refused):
    assert words in refused(**changes)


def test_no_rounds_at_all(refused):
    assert "`num_rounds` is 0; it must be a whole number of at least 1" in refused(num_rounds=0)


def test_too_few_held_out_examples_to_score_on(refused, data, write_rows):
    write_rows(data / "validation.jsonl", [PROMPT] * 3)
    assert "there are 3, of which one would decide; give at least 4" in refused()


def test_missing_columns(refused, data, write_rows):
    write_rows(data / "train.jsonl", [{"question": "a", "answer": "b"}] * 24)
    sentence = refused()
    assert "has the columns question, answer" in sentence
    assert "prompt + completion; messages; conversations; instruction + output; text" in sentence


def test_missing_columns_of_a_task(refused):
    sentence = refused(task="sst2")
    assert "The task sst2 reads the columns sentence, label" in sentence
    assert "has prompt, completion" in sentence


@pytest.mark.parametrize("split", ("train", "validation"))
def test_an_empty_split(split, refused, data):
    (data / f"{split}.jsonl").write_text("")
    assert f"The {split} split is empty" in refused()


@pytest.mark.parametrize("split", ("train", "validation"))
def test_prompts_that_leave_no_supervised_token(split, refused, data, write_rows):
    long = {"prompt": "film " * 40, "completion": " good"}
    count = 24 if split == "train" else 8
    write_rows(data / f"{split}.jsonl", [PROMPT] * 3 + [long] * 2 + [PROMPT] * (count - 5))
    sentence = refused(max_length=16)
    assert f"2 of {count} examples of {data / split}.jsonl have no supervised token" in sentence
    assert "the first in row 4" in sentence


def test_an_unknown_option_in_yaml(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("lora_rr: 4\n")
    sentence = refused("--config", tmp_path / "run.yaml")
    assert "Unknown option 'lora_rr' in" in sentence and "did you mean lora_r" in sentence


def test_an_unknown_option_in_the_allocation_block(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("allocation:\n  num_runds: 4\n")
    sentence = refused("--config", tmp_path / "run.yaml")
    assert "'num_runds' in the block `allocation:`" in sentence
    assert "did you mean num_rounds" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_r: [4", "is not valid YAML"),
        ("lora_r: four", "lora_r"),
        ("packing: perhaps", "packing"),
        ("allocation:\n  seed: x", "`seed` is 'x'"),
    ],
)
def test_yaml_that_cannot_be_used(text, words, refused, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused("--config", tmp_path / "run.yaml")


def test_a_configuration_that_is_not_there(refused, tmp_path):
    assert "There is no file" in refused("--config", tmp_path / "none.yaml")


def test_a_configuration_that_is_a_folder(refused, tmp_path):
    sentence = refused("--config", tmp_path)
    assert sentence == f"{tmp_path} is a folder; `--config` takes a YAML file."


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rr", "4"], "Unknown option 'lora_rr' among the flags; did you mean lora_r"),
        (["--num_runds", "4"], "did you mean allocation.num_rounds"),
        (["--lora_r", "four"], "invalid int value: 'four'"),
        (["--ranks_per_round", "["], "ranks_per_round"),
        (["--max_rank", "none"], "`max_rank` is 'none'"),
        (["--allocation.budget", "rank"], "Did you mean 'ranks'"),
    ],
)
def test_flags_that_cannot_be_used(flags, words, refused):
    assert words in refused(*flags)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(lora_target_parameters="mlp.experts.down_proj"),
            "`lora_target_parameters` names 'mlp.experts.down_proj', and the Llama",
        ),
        (
            dict(lora_task_type="NONSENSE"),
            "`lora_task_type` is 'NONSENSE', and follows from the lm",
        ),
        (dict(text_column="a"), "`text_column` is read by the classification head, and this run"),
        (dict(stride=8), "`stride` is read by the span head, and this run has the lm head"),
        (dict(save_steps=2), "only with `save_strategy` 'steps' (it is 'epoch'); give that too"),
        (dict(resume_from_checkpoint="x"), "goes on from its last checkpoint by `--resume`"),
        (dict(dataset_streaming="true"), "which a stream does not have"),
        (dict(model_init_kwargs='{"dtype": "float16"}'), "use `--dtype`"),
        (dict(use_liger_kernel="true"), "pip install liger-kernel"),
        (
            dict(load_best_model_at_end="true", metric_for_best_model="f1"),
            "which no evaluation of the lm head computes; use loss or mean_token_accuracy",
        ),
        (dict(lr_scheduler_type="warmup_stable_decay"), "num_decay_steps"),
    ],
)
def test_options_that_would_have_no_effect_or_fail_later(changes, words, refused):
    assert words in refused(**changes)


def test_options_that_an_encoders_head_does_not_read(refused, bert_folder):
    sentence = refused(model_name_or_path=bert_folder, packing="true", num_rounds=None)
    assert "`packing` is read by the lm head, and this run has the classification head" in sentence


@pytest.mark.parametrize("name", ("meta-llama/Llama-2-7b-hf", "smollm2"))
def test_a_hub_model_offline(name, refused):
    sentence = refused(model_name_or_path=name)
    assert f"There is no folder {name!r} here" in sentence
    assert "'smollm2-135m', 'minilm-l6'" in sentence


def test_a_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} could not be loaded" in refused(
        model_name_or_path=tmp_path / "empty"
    )


def test_a_model_without_its_tokenizer(refused, tmp_path, llama_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in llama_folder.iterdir():
        if "token" not in path.name:
            shutil.copy(path, bare)
    sentence = f"{bare} holds a model without its tokenizer (no tokenizer.json); save it there too"
    assert sentence in refused(model_name_or_path=bare)


@pytest.mark.parametrize("name", ("no/such/file.jsonl", "./nowhere"))
def test_data_that_is_not_there(name, refused):
    assert f"There is no file or folder '{name}'" in refused(dataset_name=name)


def test_no_data_named(refused):
    sentence = refused(dataset_name=None)
    assert "No data is named; give `--dataset_name`" in sentence


def test_an_unknown_task(refused):
    assert "There is no task 'sst' (did you mean 'sst2'?)" in refused(task="sst")


def test_an_unknown_metric_or_missing_strategy_is_transformers_own_sentence(refused):
    sentence = refused(load_best_model_at_end="true", eval_strategy="no")
    assert "load_best_model_at_end" in sentence


def test_an_output_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "out").write_text("mine")
    sentence = f"`--output_dir` is {tmp_path / 'out'}, and {tmp_path / 'out'} is a file; name a"
    assert sentence in train().sentence
    assert f"and {tmp_path / 'out'} is a file" in train(output_dir=tmp_path / "out/run").sentence
    assert (tmp_path / "out").read_text() == "mine"


def test_labels_that_a_language_model_would_not_learn(train, data, write_rows):
    for split, count in (("train", 24), ("validation", 8)):
        write_rows(
            data / f"{split}.jsonl", [{"text": "a film", "label": n % 2} for n in range(count)]
        )
    sentence = train().sentence
    assert "has the column label beside its texts, which a language model would not" in sentence
    assert "use `--head classification`, or `--head lm` for texts alone" in sentence
    assert train("--dry-run", head="lm").code == 0


def test_a_row_that_is_no_json_and_how_to_mend_it(refused, data):
    (data / "train.jsonl").write_text('{"text": "a"}\n{"text": "a"\n')
    assert refused().endswith("column 13); mend or delete the line.")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("learning_rate", 0, "above 0"),
        ("learning_rate", "nan", "above 0"),
        ("num_train_epochs", -1, "above 0"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("weight_decay", -0.5, "at least 0"),
        ("logging_steps", 0, "above 0"),
        ("warmup_steps", -3, "at least 0"),
        ("max_length", 0, "at least 1"),
        ("lora_alpha", 0, "above 0"),
        ("lora_dropout", 1, "at least 0 and below 1"),
        ("seed", -1, "at least 0 and at most 4,294,967,295"),
        ("max_steps", 0, "at least 1, or -1 for a run as long as its epochs"),
    ],
)
def test_numbers_that_an_option_cannot_be(name, value, allowed, refused):
    assert refused(**{name: value}) == f"`{name}` is {value}; it must be {allowed}."


def test_a_budget_that_is_none(call):
    assert call("methods", "--budget", "-5").sentence == "`--budget` is -5; it must be at least 1."


def test_a_column_of_labels_that_is_missing(refused, bert_folder):
    sentence = refused(model_name_or_path=bert_folder, label_column="verdict")
    assert "verdict" in sentence and "prompt, completion" in sentence


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["--what"],
        ["train", "--resume", "--overwrite"],
        ["generate", "run"],
        ["demo", "--what"],
    ],
)
def test_wrong_usage(words, capfd):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert "error: " in err and "Traceback" not in err


def test_what_a_terminal_would_obey_is_shown_and_not_sent(call, tmp_path):
    answer = call("ranks", tmp_path / "a\x1b[2Jb")
    assert answer.code == 2 and r"a\x1b[2Jb is not a folder" in answer.sentence
    assert "\x1b" not in answer.err
