"""A checkpoint holds every weight of the model, but for a head that is new."""

import shutil

import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from loralloc.runs.models import load_model, load_tokenizer, load_with_new_head
from loralloc.runs.run import HEADS, prepare, train
from loralloc.runs.trained import load_trained

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def changed(folder, change):
    """The checkpoint with its weights changed."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def refused(folder, head="lm", **options):
    with pytest.raises(ValueError) as caught:
        load_model(str(folder), head=HEADS[head], **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_language_model_without_its_head_is_refused(saved):
    folder = saved(LlamaModel(LlamaConfig(**SIZES)))
    assert refused(folder) == (
        f"{folder} lacks weights of a LlamaForCausalLM, which would stay as they are drawn at "
        "random: lm_head.weight; use a checkpoint that was saved with them."
    )


def test_a_head_that_is_tied_to_the_embeddings_is_not_missing(saved):
    folder = saved(LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=True)))
    model, new = load_with_new_head(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert new == []


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_that_lacks_a_weight_of_the_backbone_is_refused(head, saved):
    model = tiny.llama() if head == "lm" else BertForMaskedLM(BertConfig(**SIZES))
    folder = saved(model)
    name = next(key for key in load_file(folder / "model.safetensors") if ".1." in key)
    assert name in refused(changed(folder, lambda weights: weights.pop(name)), head)


def test_many_missing_weights_are_not_all_named(saved):
    folder = changed(saved(tiny.llama()), lambda w: [w.pop(k) for k in list(w) if ".1." in k])
    assert " and 5 more; use" in refused(folder)


@pytest.mark.parametrize(
    ("head", "expected"),
    [("classification", ["bert.pooler.dense", "classifier"]), ("span", ["qa_outputs"])],
)
def test_the_new_head_of_an_encoder_is_named_with_its_pooler(head, expected, saved):
    folder = saved(BertForMaskedLM(BertConfig(**SIZES)))
    labels = ("a", "b") if head == "classification" else ()
    assert load_with_new_head(str(folder), head=HEADS[head], labels=labels)[1] == expected


def test_weights_of_another_shape_are_refused_by_name(saved):
    def cut(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"][:5]

    sentence = refused(changed(saved(tiny.llama()), cut))
    assert (
        "other shapes than its config.json describes: model.norm.weight is (5,) and not (32,)"
        in (sentence)
    )


def test_a_head_of_other_labels_is_refused_by_name(saved):
    folder = saved(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)))
    sentence = refused(folder, "classification", labels=("a", "b"))
    assert "score.weight is (3, 32) and not (2, 32); use a checkpoint of this model with as" in (
        sentence
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_was_cut_off_is_told_in_a_sentence(name, tmp_path, llama_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    load = load_tokenizer if name == "tokenizer.json" else load_model
    with pytest.raises(ValueError, match=f"{folder} could not be loaded: ") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_package_that_a_model_needs_is_named(monkeypatch, llama_folder):
    from transformers import AutoModelForCausalLM

    def without(*_, **__):
        raise ImportError("LlamaTokenizer requires the SentencePiece library\nInstall it.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without)
    words = "without a package that is not installed: LlamaTokenizer requires the SentencePiece"
    assert words in refused(llama_folder)


def test_a_run_whose_base_model_has_lost_a_weight_is_not_opened(
    tmp_path, saved, llama_folder, write_rows
):
    rows = [{"prompt": f"film {i}", "completion": " good"} for i in range(8)]
    base = tmp_path / "base"
    model = load_model(str(llama_folder))
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(base)
    options = {
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
        "model_name_or_path": base,
        "output_dir": tmp_path / "run",
        "method": "lora",
        "max_steps": 1,
        "validation_examples": 2,
    }
    train(prepare(options))
    changed(base, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks weights of a LlamaForCausalLM.* lm_head\.weight"):
        load_trained(tmp_path / "run")
