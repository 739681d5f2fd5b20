"""`loralloc lint` as a person uses it."""

import tiny
from adapter_folders import UNEVEN, made


def test_faults_are_told_and_mended(call, tmp_path):
    adapter = made(tmp_path, tiny.llama(), r=20, ranks=UNEVEN)
    answer = call("lint", adapter)
    assert answer.code == 1
    assert "SGLang refuses to load it: model.layers" in answer.out
    assert f"`loralloc lint {adapter} --fix portable` writes a form" in answer.out
    mended = call("lint", adapter, "--fix", "portable")
    assert mended.code == 0, mended.err
    assert f"{tmp_path / 'adapter-portable'}: nothing found." in mended.out
    again = call("lint", tmp_path / "adapter-portable")
    assert again.code == 0 and "nothing found for PEFT, PEFT hotswap, vLLM" in again.out


def test_what_a_form_cannot_mend_is_left_and_told(call, tmp_path):
    adapter = made(tmp_path, tiny.llama(), modules_to_save=["lm_head"], use_rslora=True)
    answer = call("lint", adapter, "--fix", "portable", "--for", "llama.cpp")
    assert answer.code == 1
    told = call("lint", adapter)
    assert f"`loralloc export {adapter} --to merged` writes a model without an" in told.out
    assert "left there.\n  llama.cpp loads ranks only" in answer.out


def test_options_of_the_fix_are_refused_without_it(call, tmp_path):
    answer = call("lint", tmp_path, "--output_dir", tmp_path / "new")
    assert "`--output_dir` is for what `--fix` writes" in answer.sentence
