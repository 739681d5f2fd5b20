"""`loralloc export` as a person uses it."""

import tiny
from adapter_folders import made


def test_what_is_written_is_named_with_how_far_off_it_is(call, tmp_path):
    adapter = made(tmp_path, tiny.llama())
    answer = call("export", adapter, "--to", "portable", "--rank-multiple", 8)
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"{tmp_path / 'adapter-portable'}: logits within ")
    again = call("export", adapter, "--to", "portable")
    assert "is there already" in again.sentence


def test_a_folder_without_an_adapter_is_refused_in_a_sentence(call, tmp_path):
    answer = call("export", tmp_path, "--to", "peft")
    assert "holds no adapter_config.json" in answer.sentence
