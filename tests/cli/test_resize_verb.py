"""`loralloc resize` as a person uses it."""

import tiny
from adapter_folders import made


def test_what_changed_is_told(call, tmp_path):
    adapter = made(tmp_path, tiny.llama(), r=4)
    answer = call("resize", adapter, "--rank", 2)
    assert answer.code == 0, answer.err
    assert f"{tmp_path / 'adapter-resized'}: 56 ranks in 14 modules, now 28 in 14" in answer.out
    again = call("resize", adapter, "--rank", 2)
    assert "is there already" in again.sentence


def test_an_unknown_flag_is_refused(call, tmp_path):
    adapter = made(tmp_path, tiny.llama(), r=4)
    answer = call("resize", adapter, "--rank", 2, "--tusk", "sst2")
    assert "tusk" in answer.sentence
