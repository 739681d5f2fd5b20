"""The paper's protocol through whole runs: when they are evaluated, stopped, and what they keep."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainers import Interrupted, KillAt, adapter, present, ranks_now, without_seconds
from transformers import TrainerCallback

from loralloc.allocation.record import Record
from loralloc.methods.restore import saved_ranks
from loralloc.runs import protocol
from loralloc.runs import run as runs
from loralloc.runs.settings import resolve, saved

OPTIONS = {
    "protocol": "paper",
    "lora_r": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "num_rounds": 2,
    "warmup_epochs": 0.5,
    "recovery_epochs": 0.5,
    "scoring_examples": 4,
    "use_cpu": True,
    "disable_tqdm": True,
}
"""12 steps of 6 an epoch, the last round after step 6."""

EVERY_STEP = ("--eval_steps", 1)
WORDS = ("good", "bad")


def prompts(count):
    return [{"prompt": f"film {i} is", "completion": f" {WORDS[i % 2]}"} for i in range(count)]


def labelled(count):
    return [{"sentence": f"the film is {WORDS[i % 2]}", "label": i % 2} for i in range(count)]


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory, llama_folder, bert_folder):
    """Settings of a small run of a kind."""
    folder = tmp_path_factory.mktemp("data")
    for kind, rows in (("lm", prompts), ("classification", labelled)):
        (folder / kind).mkdir()
        for name, count in (("train", 24), ("validation", 8)):
            text = "".join(json.dumps(row) + "\n" for row in rows(count))
            (folder / kind / f"{name}.jsonl").write_text(text)

    def settings(kind, output, *more):
        model, task = (llama_folder, []) if kind == "lm" else (bert_folder, ["--task", "sst2"])
        flags = ["--dataset_name", folder / kind, "--model_name_or_path", model, *task]
        flags += [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
        return resolve([str(flag) for flag in [*flags, "--output_dir", output, *more]])

    return settings


class Scripted(TrainerCallback):
    """Development losses by step, in place of those that were measured."""

    def __init__(self, losses):
        self.losses = losses
        self.ranks = {}

    def on_evaluate(self, args, state, control, metrics=None, model=None, **_):
        metrics["eval_loss"] = float(self.losses(state.global_step))
        self.ranks[state.global_step] = ranks_now(model)


class KillAtEnd(TrainerCallback):
    """End a run from outside once it is trained, before anything is saved."""

    def on_train_end(self, args, state, control, **_):
        raise Interrupted


def prepared(settings, losses, *callbacks, **how):
    run = runs.prepare(settings, **how)
    for callback in callbacks:
        run.trainer.add_callback(callback)
    # The first of all, so that whoever reads the loss reads this one.
    run.trainer.callback_handler.callbacks.insert(0, Scripted(losses))
    return run


def trained(settings, losses, **how):
    run = prepared(settings, losses, **how)
    runs.train(run)
    return run


def evaluated(run):
    return [entry["step"] for entry in run.trainer.state.log_history if "eval_loss" in entry]


def best_step(run):
    return run.trainer.state.best_global_step


def checkpoints(run):
    return sorted(p.name for p in run.settings.output_dir.glob("checkpoint-*"))


@pytest.fixture(params=["lm", "classification"])
def kind(request):
    return request.param


def test_a_short_run_is_evaluated_twice_an_epoch_and_at_its_last_step(kind, settings_of, tmp_path):
    more = ["--num_train_epochs", 2.2, "--save_total_limit", 9]
    run = trained(settings_of(kind, tmp_path / "out", *more), lambda step: step)
    assert evaluated(run) == [3, 6, 9, 12, 14]
    assert checkpoints(run) == sorted(f"checkpoint-{step}" for step in evaluated(run))
    data = json.loads((tmp_path / "out" / "settings.json").read_text())
    reason = "protocol paper: twice an epoch, not every 200: under 2,000 in all"
    assert data["eval_steps"] == data["save_steps"] == {"value": 3, "source": reason}


@pytest.mark.parametrize(
    ("epochs", "every", "source"),
    [(333, 3, "protocol paper: twice"), (334, 200, "protocol paper")],
)
def test_two_thousand_steps_in_all_are_enough_for_the_papers_two_hundred(
    epochs, every, source, settings_of, tmp_path
):
    # 1,998 or 2,004 steps
    run = runs.prepare(settings_of("lm", tmp_path, "--num_train_epochs", epochs))
    args = run.trainer.args
    assert args.eval_steps == args.save_steps == run.settings.given["eval_steps"] == every
    assert run.settings.sources["eval_steps"].startswith(source)


def test_what_a_user_gave_about_evaluation_stays_in_a_short_run(settings_of, tmp_path):
    run = runs.prepare(settings_of("lm", tmp_path, "--eval_steps", 5))
    assert run.trainer.args.eval_steps == run.trainer.args.save_steps == 5
    assert run.settings.sources["eval_steps"] == "flag"


def test_the_best_checkpoint_after_the_last_round_is_what_is_saved(kind, settings_of, tmp_path):
    # The lowest of all are before the last round, and at a step between rounds.
    losses = {2: 0.1, 5: 0.2, 6: 5, 7: 4, 8: 1, 9: 2}
    run = trained(settings_of(kind, tmp_path, *EVERY_STEP), lambda step: losses.get(step, 3))
    assert evaluated(run) == list(range(1, 13))
    assert best_step(run) == 8
    assert checkpoints(run) == ["checkpoint-8"]
    final, best = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / "checkpoint-8")
    )
    assert final.keys() == best.keys()
    assert all(torch.equal(final[name], best[name]) for name in best)
    now = adapter(run.model)
    assert all(torch.equal(now[name], best[name]) for name in best)
    record = Record.load(tmp_path)
    assert [entry.step for entry in record.rounds] == [3, 6]
    assert saved_ranks(tmp_path) == present(record.ranks) == ranks_now(run.model)


def test_patience_is_counted_from_the_last_round(kind, settings_of, tmp_path):
    more = [*EVERY_STEP, "--early_stopping_patience", 2]  # it would run out between the rounds
    run = trained(settings_of(kind, tmp_path, *more), lambda step: step)  # worse at every step
    assert len(run.allocation.record.rounds) == 2
    assert evaluated(run) == list(range(1, 9))
    assert best_step(run) == 6


LOSSES = {6: 5, 7: 1, 8: 2, 9: 3, 10: 4}
STOPPING = (*EVERY_STEP, "--early_stopping_patience", 3, "--lora_dropout", 0.1)


def stopping_loss(step):
    """Best after the last round at step 7, so that a patience of 3 ends at step 10."""
    return LOSSES.get(step, 0.1 * step)


@pytest.fixture(scope="module")
def unbroken(settings_of, tmp_path_factory):
    """A run of each kind that nothing interrupts, made when it is asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            settings = settings_of(kind, tmp_path_factory.mktemp(kind), *STOPPING)
            made[kind] = trained(settings, stopping_loss)
            assert (best_step(made[kind]), evaluated(made[kind])[-1]) == (7, 10)
        return made[kind]

    return run


def test_the_evaluation_at_the_step_of_a_round_is_of_the_ranks_after_it(kind, unbroken):
    run = unbroken(kind)
    seen, rounds = run.trainer.callback_handler.callbacks[0].ranks, run.allocation.record.rounds
    assert rounds[0].ranks_before != rounds[0].ranks_after != rounds[1].ranks_after
    assert seen[2] == present(rounds[0].ranks_before)
    assert seen[3] == present(rounds[0].ranks_after)
    assert seen[6] == present(rounds[1].ranks_after)


def resumed(kind, settings_of, folder, *more):
    settings = settings_of(kind, folder, *STOPPING, *more)
    return trained(settings, stopping_loss, resume=True)


def assert_same(run, whole):
    assert (best_step(run), evaluated(run)) == (best_step(whole), evaluated(whole))
    assert without_seconds(run.allocation.record.rounds) == without_seconds(
        whole.allocation.record.rounds
    )
    files = [r.settings.output_dir / "adapter_model.safetensors" for r in (run, whole)]
    torch.testing.assert_close(*map(load_file, files), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(("kind", "step"), [("lm", 5), ("lm", 8), ("classification", 8)])
def test_a_killed_run_keeps_its_best_checkpoint_and_its_patience(
    kind, step, settings_of, unbroken, tmp_path
):
    with pytest.raises(Interrupted):
        runs.train(prepared(settings_of(kind, tmp_path, *STOPPING), stopping_loss, KillAt(step)))
    assert_same(resumed(kind, settings_of, tmp_path), unbroken(kind))


@pytest.fixture
def killed_at_its_end(settings_of, tmp_path):
    """The folder of a run that stopped early, but whose best checkpoint was never saved."""
    run = prepared(
        settings_of("lm", tmp_path / "out", *STOPPING, "--save_total_limit", 2),
        stopping_loss,
        KillAtEnd(),
    )
    with pytest.raises(Interrupted):
        runs.train(run)
    assert checkpoints(run) == ["checkpoint-10", "checkpoint-7"]
    return tmp_path / "out"


@pytest.mark.reliability
def test_a_run_that_was_out_of_patience_trains_no_further(killed_at_its_end, settings_of, unbroken):
    run = resumed("lm", settings_of, killed_at_its_end)
    assert_same(run, unbroken("lm"))


@pytest.mark.reliability
def test_more_patience_may_be_given_when_a_run_is_resumed(killed_at_its_end, settings_of):
    run = resumed("lm", settings_of, killed_at_its_end, "--early_stopping_patience", 4)
    assert evaluated(run)[-1] == 11


@pytest.mark.reliability
def test_the_best_checkpoint_is_found_where_the_folder_was_moved_to(
    killed_at_its_end, settings_of, unbroken, tmp_path
):
    shutil.move(killed_at_its_end, tmp_path / "moved")
    assert_same(resumed("lm", settings_of, tmp_path / "moved"), unbroken("lm"))


@pytest.mark.reliability
def test_a_best_checkpoint_that_is_gone_is_refused(killed_at_its_end, settings_of):
    shutil.rmtree(killed_at_its_end / "checkpoint-7")
    with pytest.raises(ValueError, match=r"The best checkpoint so far is .*checkpoint-7, which is"):
        resumed("lm", settings_of, killed_at_its_end)


@pytest.mark.reliability
def test_patience_may_be_asked_for_when_a_run_is_resumed(settings_of, tmp_path):
    plain = ["--protocol", "paper", *EVERY_STEP]
    settings = settings_of("lm", tmp_path, *plain)
    run = prepared(settings, stopping_loss, KillAt(8))
    run.trainer.remove_callback(protocol.EarlyStopping)
    with pytest.raises(Interrupted):
        runs.train(run)
    run = resumed("lm", settings_of, tmp_path)
    assert evaluated(run)[-1] == 11  # 9, 10 and 11: what went before was not counted


def paper(*flags, num_examples=6_000, **how):
    settings = resolve(["--protocol", "paper", *map(str, flags)], **how)
    return protocol.apply(settings, num_examples=num_examples)


def test_the_papers_settings():
    settings = paper()
    assert {name: source for name, source in settings.sources.items() if "paper" in source} == {
        name: "protocol paper"
        for name in (
            *("num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
            *("eval_strategy", "eval_steps", "save_strategy", "save_steps"),
            *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
        )
    }
    args = settings.training
    assert (args.num_train_epochs, args.learning_rate, args.max_length) == (10, 1e-4, 2048)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("linear", 0.06)
    assert (args.eval_strategy, args.eval_steps) == ("steps", 200)
    assert (args.save_strategy, args.save_steps) == ("steps", 200)
    assert (args.load_best_model_at_end, args.metric_for_best_model) == (True, "loss")
    assert args.greater_is_better is False
    assert settings.run.early_stopping_patience == 10


def test_the_tuned_protocol_is_the_papers_at_the_rate_that_the_method_recommends():
    flags = ["--protocol", "tuned", "--method", "p-tuning-v2"]
    settings = protocol.apply(resolve(flags), num_examples=6_000)
    plain = paper("--method", "p-tuning-v2")
    assert settings.training.learning_rate == 7e-3
    assert "recommended for p-tuning-v2 (the authors' script" in settings.sources["learning_rate"]
    changed = {name for name in plain.given if plain.given[name] != settings.given[name]}
    assert changed == {"learning_rate", "protocol"}
    given = protocol.apply(resolve([*flags, "--learning_rate", "2e-3"]), num_examples=6_000)
    assert given.training.learning_rate == 2e-3


def test_without_a_protocol_nothing_changes():
    settings = resolve([])
    assert protocol.apply(settings, num_examples=6_000) is settings


@pytest.mark.parametrize(("num_examples", "batch"), [(9_999, 16), (10_000, 128)])
def test_the_batch_follows_the_number_of_examples(num_examples, batch):
    args = paper(num_examples=num_examples).training
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (batch, 1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--per_device_train_batch_size", 8], (8, 16)),
        (["--gradient_accumulation_steps", 4], (32, 4)),
        (["--per_device_train_batch_size", 5, "--gradient_accumulation_steps", 3], (5, 3)),
    ],
)
def test_what_the_device_cannot_hold_is_accumulated(flags, expected):
    args = paper(*flags, num_examples=10_000).training
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", 3.0),
        ("learning_rate", 2e-4),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 7.0),
        ("max_length", 64),
        ("eval_steps", 50),
        ("early_stopping_patience", 2),
        ("metric_for_best_model", "accuracy"),
    ],
)
def test_a_flag_a_file_and_an_earlier_run_win(name, value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: {value}\n")
    ways = {
        "flag": paper(f"--{name}", value),
        f"file {path}": paper(config=path),
        "earlier run": paper(base={"protocol": "paper", name: value}),
    }
    for source, settings in ways.items():
        holder = settings.run if hasattr(settings.run, name) else settings.training
        assert getattr(holder, name) == value
        assert settings.sources[name] == source


def test_checkpoints_follow_the_evaluations_that_a_user_chose():
    args = paper("--eval_steps", 50).training
    assert (args.save_strategy, args.save_steps) == ("steps", 50)
    args = paper("--eval_strategy", "epoch").training
    assert (args.eval_strategy, args.save_strategy) == ("epoch", "epoch")
    args = paper("--eval_strategy", "steps", "--load_best_model_at_end", "true").training
    assert (args.eval_steps, args.save_steps) == (200, 200)


def test_checkpoints_follow_the_evaluations_without_a_protocol_too():
    flags = ["--load_best_model_at_end", "true", "--eval_strategy", "steps"]
    args = resolve(flags).training
    assert (args.eval_steps, args.save_steps) == (10, 10)  # as logging_steps


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--packing", "true"], "`packing` is true, but the paper's protocol counts a batch in"),
        (
            ["--per_device_train_batch_size", 24],
            "`per_device_train_batch_size` is 24, which does not divide the paper's batch of 16",
        ),
        (["--gradient_accumulation_steps", 3], "give `per_device_train_batch_size` too"),
    ],
)
def test_what_contradicts_the_protocol_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        paper(*flags)


def test_an_unknown_protocol(tmp_path):
    with pytest.raises(ValueError, match=r"invalid choice: 'papers' \(choose from '?paper"):
        resolve(["--protocol", "papers"])
    (tmp_path / "run.yaml").write_text("protocol: papers\n")
    with pytest.raises(ValueError, match=r"`protocol` in .* cannot be 'papers'; choose from 'pape"):
        resolve([], config=tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--early_stopping_patience", 0], "`early_stopping_patience` is 0; it must be at least 1"),
        (
            ["--load_best_model_at_end", "false"],
            r"`early_stopping_patience` is 10 \(protocol paper\), but which evaluation is the best",
        ),
        (["--eval_strategy", "no"], r"\(`load_best_model_at_end`: protocol paper\) is chosen by"),
        (
            ["--eval_steps", 2, "--save_steps", 4],
            "`eval_steps` is 2 and `save_steps` 4, but .* give both the same value",
        ),
    ],
)
def test_a_choice_of_checkpoint_that_could_not_be_made_is_refused(
    flags, words, settings_of, tmp_path
):
    with pytest.raises(ValueError, match=words):
        runs.prepare(settings_of("lm", tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_protocol(tmp_path):
    folder = tmp_path / "run"
    first = paper("--output_dir", folder)
    first.save()
    second = protocol.apply(resolve([], base=saved(folder)), num_examples=6_000)
    assert second.given == first.given
    assert resolve(["--protocol", "paper"], base=saved(folder)).given == first.given
    with pytest.raises(ValueError, match="`protocol` is 'paper', but the run was begun with None"):
        resolve(["--protocol", "paper"], base={"lora_r": 8})
