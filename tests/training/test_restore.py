import pytest
import tiny
import torch
from peft import PeftModel
from trainers import adapter, ranks_now

from loralloc import resize
from loralloc.methods.restore import restore_shapes, saved_ranks

WANTED = {
    "model.layers.0.self_attn.q_proj": 1,
    "model.layers.0.mlp.up_proj": 6,
    "model.layers.1.self_attn.v_proj": 0,
}


@pytest.fixture
def saved(tmp_path):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    resize(model, WANTED)
    model.save_pretrained(tmp_path)
    return model


def test_ranks_are_read_from_the_tensors(saved, tmp_path):
    assert saved_ranks(tmp_path) == ranks_now(saved)
    assert "model.layers.1.self_attn.v_proj" not in saved_ranks(tmp_path)


def test_a_restored_model_takes_the_saved_weights(saved, tmp_path):
    model = tiny.adapted(tiny.llama())
    restore_shapes(model, tmp_path)
    assert ranks_now(model) == ranks_now(saved)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(adapter(model), adapter(saved), rtol=0, atol=0)
    batch = tiny.causal_batch()
    torch.testing.assert_close(model.eval()(**batch).logits, saved.eval()(**batch).logits)


def test_it_is_what_stock_peft_makes_of_the_folder(saved, tmp_path):
    model = tiny.adapted(tiny.llama())
    restore_shapes(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert ranks_now(stock) == ranks_now(model)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="name a folder that an adapter was saved to"):
        saved_ranks(tmp_path)


def test_a_module_that_the_model_lacks_is_refused(saved, tmp_path):
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj"])
    before = ranks_now(model)
    with pytest.raises(ValueError, match=r"\(model\.layers\.0\.\S+\); build the model anew"):
        restore_shapes(model, tmp_path)
    assert ranks_now(model) == before
