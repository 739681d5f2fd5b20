"""Answers as characters, as tokens of windows, as characters again; and runs that learn them."""

import itertools
import json
import os
from types import SimpleNamespace

import encoders
import pytest
import torch
from crossed import crossed
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from trainers import losses, present, ranks_now
from transformers import AutoModelForQuestionAnswering

from loralloc.runs import run as runs
from loralloc.runs.data import numbered
from loralloc.runs.heads.span import span_rows, span_trainer, text_of, tokens_of, windows
from loralloc.runs.models import load_tokenizer
from loralloc.runs.run import HEADS
from loralloc.runs.trained import head_of, load_trained
from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import to_examples
from loralloc.tasks.source import Split, load_splits
from loralloc.tasks.task import Span

FILLER = "the cold story of a warm place is good and bad, "


@pytest.fixture(params=encoders.KINDS, scope="module")
def tokenizer(request):
    return encoders.tokenizer(request.param)


@pytest.fixture(scope="module")
def bert():
    return encoders.tokenizer("bert")


def span_of(context, answer, *, at=None, question="Who made the film?"):
    start = context.index(answer) if at is None else at
    return Span(question=question, context=context, answers=(answer,), starts=(start,))


def mapped_back(tokenizer, span, *, max_length=64, stride=24):
    """What the first answer becomes through each window that holds it whole."""
    (answer, *_), (start, *_) = span.answers, span.starts
    found = []
    for window in windows(tokenizer, [span], max_length=max_length, stride=stride):
        tokens = tokens_of(window, start, start + len(answer))
        if tokens:
            found.append(text_of(window, span.context, *tokens))
    return found


def test_windows_fit_cover_the_context_and_share_the_stride(tokenizer):
    span = span_of(FILLER * 20 + "Ann Lee.", "Ann Lee")
    cut = windows(tokenizer, [span], max_length=40, stride=10)
    assert len(cut) > 5
    assert all(len(window.input_ids) <= 40 for window in cut)
    assert all(len(window.input_ids) == len(window.offsets) for window in cut)
    held = [[pair for pair in window.offsets if pair is not None] for window in cut]
    for before, after in itertools.pairwise(held):
        assert before[-10:] == after[:10]
    whole = [pair for number, part in enumerate(held) for pair in part[10 if number else 0 :]]
    alone = tokenizer(span.context, add_special_tokens=False, return_offsets_mapping=True)
    assert whole == alone["offset_mapping"]
    assert (cut[0].begin, cut[-1].end) == (0, len(span.context))


def test_a_quarter_of_the_window_is_shared_by_default(tokenizer):
    span = span_of(FILLER * 20, "cold")
    assert windows(tokenizer, [span], max_length=40) == windows(
        tokenizer, [span], max_length=40, stride=10
    )


def test_a_window_begins_with_cls_and_the_question(tokenizer):
    (window,) = windows(tokenizer, [span_of("Ann Lee did.", "Ann Lee")], max_length=64)
    assert window.input_ids[0] == tokenizer.cls_token_id
    held = [position for position, pair in enumerate(window.offsets) if pair is not None]
    assert held == list(range(held[0], len(window.offsets) - 1))
    before = tokenizer.decode(window.input_ids[1 : held[0]])
    assert before.lower().startswith("who made the film")


LONG = FILLER * 40
CASES = {
    "beginning": ("Ann Lee made it. " + LONG, "Ann Lee"),
    "end": (LONG + "and then Ann Lee", "Ann Lee"),
    "end with full stop": (LONG + "and then Ann Lee.", "Ann Lee."),
    "middle": (LONG + "Ann Lee made it. " + LONG, "Ann Lee"),
    "whole context": ("Ann Lee", "Ann Lee"),
    "white space around": ("  \n Ann Lee \t ", "Ann Lee"),
    "two blanks inside": (LONG + "the  force  of it " + LONG, "the  force  of"),
    "accents": (LONG + "the Café Résumé of it", "Café Résumé"),
    "combining at the end": (LONG + "the Cafe\u0301 of it", "Cafe\u0301"),
    "combining inside": (LONG + "the Re\u0301sume\u0301 2001 of it", "Re\u0301sume\u0301 2001"),
    "combining at the very end": (LONG + "the Cafe\u0301\u0323", "Cafe\u0301\u0323"),
    "right to left": (LONG + "said שלום עולם to us", "שלום עולם"),
    "points and dots": (LONG + "said שָׁלוֹם to us", "שָׁלוֹם"),
    "arabic": (LONG + "قال مرحبا بالعالم اليوم", "مرحبا بالعالم"),
    "emoji": (LONG + "it was 😀 🎬 for us", "😀 🎬"),
    "joined emoji": (LONG + "a 👨‍👩‍👧 saw 🇸🇪 ✌🏽 it", "👨‍👩‍👧 saw 🇸🇪 ✌🏽"),
    "cjk": (LONG + "在北京见到你 it", "北京"),
    "outside the first plane": (LONG + "sign 𒀀𒀁 of", "𒀀𒀁"),
    "punctuation": (LONG + "the U.S. (twice) it's", "U.S. (twice)"),
    "100,000 characters": (FILLER * 1100 + "Ann Lee " + FILLER * 1100, "Ann Lee"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_survives_windowing_and_mapping_back(name, tokenizer):
    context, answer = CASES[name]
    found = mapped_back(tokenizer, span_of(context, answer))
    assert found and set(found) == {answer}


def test_the_long_context_is_long():
    assert len(CASES["100,000 characters"][0]) > 100_000


def test_an_answer_survives_wherever_it_lies_to_the_windows_edges(tokenizer):
    words = FILLER.split()
    for number in range(60):
        before = " ".join((words * 6)[:number])
        found = mapped_back(tokenizer, span_of(f"{before} Ann Lee {LONG}", "Ann Lee"))
        assert found and set(found) == {"Ann Lee"}


PIECES = st.sampled_from(
    (
        *FILLER.replace(",", "").split(),
        *("Ann", "1998", "Café", "e\u0301t", "שלום", "שָׁ", "مرحبا", "😀", "👨‍👩‍👧", "北京", "U.S."),
        *("x\u200dy", "\u200d\u0301x", "ß", "ﬁn", "İz", "Ⅳ"),
    )
)


@given(
    pieces=st.lists(PIECES, min_size=1, max_size=60),
    blanks=st.lists(st.sampled_from([" ", "  ", "\n", "\u00a0"]), min_size=1, max_size=3),
    first=st.integers(0, 59),
    length=st.integers(1, 2),
    kind=st.sampled_from(encoders.KINDS),
)
def test_any_words_of_any_text_survive(pieces, blanks, first, length, kind, tokenizers_by_kind):
    context, starts = "", []
    for number, piece in enumerate(pieces):
        starts.append(len(context))
        context += piece + blanks[number % len(blanks)]
    first %= len(pieces)
    last = min(first + length, len(pieces)) - 1
    answer = context[starts[first] : starts[last] + len(pieces[last])]
    found = mapped_back(
        tokenizers_by_kind[kind],
        span_of(context, answer, at=starts[first]),
        max_length=128,
        stride=64,
    )
    # A tokenizer that drops a joiner at the beginning of the answer has no token for it.
    assert found and {text.lstrip("\u200d\u0301") for text in found} == {
        answer.lstrip("\u200d\u0301")
    }


@pytest.fixture(scope="module")
def tokenizers_by_kind():
    return {kind: encoders.tokenizer(kind) for kind in encoders.KINDS}


def test_an_answer_within_a_token_becomes_the_whole_token(bert):
    assert mapped_back(bert, span_of("it is good", "oo")) == ["good"]


def test_an_answer_that_no_window_holds_whole_is_not_mapped(tokenizer):
    span = span_of(LONG, LONG[:400])
    assert mapped_back(tokenizer, span, max_length=40, stride=8) == []


def test_windows_of_several_examples_say_whose_they_are(tokenizer):
    spans = [span_of("Ann Lee", "Ann"), span_of(LONG, "cold"), span_of("Bo Ek", "Bo")]
    owners = [window.example for window in windows(tokenizer, spans, max_length=64)]
    assert owners == sorted(owners) and set(owners) == {0, 1, 2} and owners.count(1) > 1


def test_no_examples_no_windows(tokenizer):
    assert windows(tokenizer, [], max_length=64) == []


@pytest.mark.parametrize(
    ("question", "stride", "words"),
    [
        ("is the film good? " * 20, None, "leaves a window of 64 no room for more of its context"),
        ("who?", 60, "than the 60 tokens that windows share; raise `max_length`"),
        ("who?", -1, "`stride` is -1; windows share 0 tokens or more."),
    ],
)
def test_no_room_for_the_context_is_refused(question, stride, words, tokenizer):
    with pytest.raises(ValueError, match=words) as caught:
        windows(tokenizer, [span_of(LONG, "cold", question=question)], max_length=64, stride=stride)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="does not know the characters of its tokens"):
        windows(SimpleNamespace(is_fast=False), [span_of("a", "a")], max_length=8)


# Rows and runs


def squad(count):
    """Rows whose answer is a name among others, the one who "made" the film; some are long."""
    names = ("Ann Lee", "Bo Ek")
    rows = []
    for number in range(count):
        maker, viewer = names[number % 2], names[1 - number % 2]
        context = f"{viewer} saw it, {maker} made it. " + FILLER * (number % 3 * 3)
        rows.append(
            {
                "context": context,
                "question": "Who made it?",
                "answers": {"text": [maker], "answer_start": [context.index(maker)]},
            }
        )
    return rows


def record(count):
    """As `squad`, with the answer in two places and the text at the end of a long one."""
    rows = []
    for row in squad(count):
        (answer,) = row["answers"]["text"]
        passage = row["context"] + f"@highlight {answer} made it"
        starts = [passage.index(answer), passage.rindex(answer)]
        spans = {"text": [answer] * 2, "start": starts, "end": [s + len(answer) for s in starts]}
        query = "The film was made by @placeholder."
        rows.append(
            {"passage": passage, "query": query, "answers": [answer], "entity_spans": spans}
        )
    return rows


def split(rows, task):
    made = Split(name="train", dataset=Dataset.from_list(rows), source="rows.jsonl")
    return span_rows({"train": made, "validation": made}, get_task(task))


@pytest.fixture
def trainer_for(tmp_path):
    def build(rows, task="squad", *, kind="bert", **options):
        from transformers import TrainingArguments

        path = encoders.folder(kind, tmp_path / kind)
        return span_trainer(
            AutoModelForQuestionAnswering.from_pretrained(path),
            load_tokenizer(str(path)),
            TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True),
            numbered(split(rows, task)),
            **options,
        )

    return build


@pytest.mark.parametrize(("rows", "task"), [(squad, "squad"), (record, "record")])
@pytest.mark.parametrize("kind", encoders.KINDS)
def test_training_rows_point_at_the_answer_or_at_cls(rows, task, kind, trainer_for):
    trainer = trainer_for(rows(6), task, kind=kind, max_length=40)
    words = trainer.processing_class
    pointed = []
    for row in trainer.train_dataset:
        assert len(row["input_ids"]) <= 40
        first, last = row["start_positions"], row["end_positions"]
        if first == 0:
            assert last == 0 and row["input_ids"][0] == words.cls_token_id
        pointed.append(words.decode(row["input_ids"][first : last + 1]).strip().lower())
    assert len(pointed) > 6
    answers = {"ann lee", "bo ek", words.cls_token.lower()}
    assert set(pointed) == answers


def test_a_window_learns_the_first_answer_that_it_holds(trainer_for):
    context = "Ann Lee saw it. " + FILLER * 10 + "Bo Ek, Ann Lee"
    places = ("Ann Lee", "Bo Ek"), (context.index("Ann"), context.index("Bo"))
    row = {"context": context, "question": "Who?"}
    row["answers"] = {"text": list(places[0]), "answer_start": list(places[1])}
    trainer = trainer_for([row] * 2, max_length=40)
    decode = trainer.processing_class.decode
    pointed = [
        decode(r["input_ids"][r["start_positions"] : r["end_positions"] + 1])
        for r in trainer.train_dataset
    ]
    half = pointed[: len(pointed) // 2]
    assert half[0] == "ann lee" and half[-1] == "bo ek"
    assert set(half[1:-1]) == {"[CLS]"}


def test_a_row_whose_answer_fits_in_no_window_is_named(trainer_for):
    rows = squad(2)
    context = rows[1]["context"] = FILLER * 20
    rows[1]["answers"] = {"text": [context[:300]], "answer_start": [0]}
    with pytest.raises(ValueError) as caught:
        trainer_for(rows, max_length=40)
    message = str(caught.value)
    assert message.startswith("Row 2 of rows.jsonl: no window of 40 tokens holds the whole answer")
    assert message.endswith("raise `stride` or `max_length`, or leave the row out.")
    assert "\n" not in message


def test_windows_are_never_longer_than_the_model_reads(trainer_for):
    for kind in encoders.KINDS:
        trainer = trainer_for(squad(3), kind=kind, max_length=1024)
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        assert max(lengths) == 64
        trainer.evaluate()


def test_a_task_without_spans_has_no_span_rows():
    with pytest.raises(
        ValueError, match=r"Row 1 of rows\.jsonl has no answer that is a stretch of"
    ):
        split([{"prompt": "a", "completion": "b"}], "demo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of each kind, through settings, with rounds."""
    made = {}

    def run(kind, score="screened"):
        if (kind, score) in made:
            return made[kind, score]
        folder = tmp_path_factory.mktemp(f"span-{kind}")
        base = encoders.folder(kind, folder / "base")
        for name, count in (("train", 24), ("validation", 8)):
            path = folder / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in squad(count)))
        options = dict(
            task="squad",
            dataset_name=folder / "data",
            model_name_or_path=base,
            output_dir=folder / "out",
            lora_r=2,
            num_train_epochs=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            num_rounds=2,
            warmup_epochs=0.5,
            recovery_epochs=0.5,
            scoring_examples=4,
            score=score,
            use_cpu=True,
            disable_tqdm=True,
        )
        prepared = runs.prepare(options)
        runs.train(prepared)
        made[kind, score] = prepared
        return prepared

    return run


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("roberta", "screened"),
        pytest.param("bert", "screened", marks=pytest.mark.slow),
        pytest.param("bert", "ablation", marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_spans_while_its_ranks_move(kind, score, finished):
    prepared = finished(kind, score)
    assert prepared.head is HEADS["span"]
    record = prepared.allocation.record
    assert len(record.rounds) == 2
    assert any(entry.added for entry in record.rounds)
    assert ranks_now(prepared.model) == present(record.ranks)
    assert sum(record.ranks.values()) == sum(record.initial_ranks.values())
    trained = list(losses(prepared.trainer).values())
    epoch = len(trained) // 6
    # Single batches of four rows go up and down.
    assert sum(trained[-epoch:]) < 0.75 * sum(trained[:epoch])
    measured = [e["eval_loss"] for e in prepared.trainer.state.log_history if "eval_loss" in e]
    assert measured[-1] < measured[0]


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_the_adapter_and_its_head_open_in_stock_peft(kind, finished):
    prepared = finished(kind)
    folder = prepared.settings.output_dir
    base = AutoModelForQuestionAnswering.from_pretrained(
        prepared.settings.model.model_name_or_path, dtype=torch.float32
    )
    opened = PeftModel.from_pretrained(base, folder).eval()
    inputs = prepared.trainer.data_collator([prepared.trainer.eval_dataset[i] for i in range(4)])
    with torch.no_grad():
        ours, theirs = prepared.model.eval()(**inputs), opened(**inputs)
        merged = opened.merge_and_unload()(**inputs)
    for other in (theirs, merged):
        torch.testing.assert_close(other.loss, ours.loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.start_logits, ours.start_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.end_logits, ours.end_logits, rtol=0, atol=1e-5)
    assert "AutoModelForQuestionAnswering" in (folder / "README.md").read_text()


def test_a_run_with_a_span_head_is_loaded_with_it(finished):
    prepared = finished("bert")
    folder = prepared.settings.output_dir
    assert head_of(folder) is HEADS["span"]
    model, words = load_trained(folder, head=HEADS["span"])
    inputs = prepared.trainer.data_collator([prepared.trainer.eval_dataset[0]])
    with torch.no_grad():
        loss = model.eval()(**inputs).loss
        torch.testing.assert_close(loss, prepared.model.eval()(**inputs).loss, rtol=0, atol=1e-6)
    assert words.cls_token == "[CLS]"
    with pytest.raises(ValueError, match="for QUESTION_ANS, which generates no text"):
        load_trained(folder)
    with pytest.raises(ValueError, match=r"The span head in .* was trained with the adapter"):
        load_trained(folder, head=HEADS["span"], with_adapter=False)


DATA = os.environ.get("LORALLOC_DATA")


@pytest.mark.skipif(DATA is None, reason="LORALLOC_DATA names no folder with the real data")
@pytest.mark.parametrize(("name", "sizes"), crossed(("squad", "record"), ((384, 128), (128, 64))))
def test_every_real_answer_survives(name, sizes):
    max_length, stride = sizes
    words = load_tokenizer("minilm-l6")
    total = exact = 0
    for part in load_splits(f"{DATA}/{name}").values():
        for example in to_examples(part, get_task(name)):
            span = example.span
            cut = windows(words, [span], max_length=max_length, stride=stride)
            for answer, start in zip(span.answers, span.starts, strict=True):
                found = [
                    text_of(window, span.context, *tokens)
                    for window in cut
                    if (tokens := tokens_of(window, start, start + len(answer)))
                ]
                assert found and len(set(found)) == 1, (answer, found)
                total += 1
                exact += found[0] == answer
                # What is not the answer to the letter is the whole words around it.
                assert answer in found[0]
                end = start + len(answer)
                glued = span.context[start - 1 : start + 1], span.context[end - 1 : end + 1]
                assert found[0] == answer or any(len(p) == 2 and p.isalnum() for p in glued)
    assert exact / total > 0.99
