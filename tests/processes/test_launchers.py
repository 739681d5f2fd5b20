"""`torchrun` and `accelerate launch` as a person starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PORT = str(20000 + os.getpid() % 20000)
LAUNCHERS = {
    "torchrun": (*("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", PORT),),
    "accelerate": (
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", PORT),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, llama_folder, write_examples):
    root = tmp_path_factory.mktemp("launched")
    shutil.copytree(llama_folder, root / "model")
    write_examples(root / "data")
    return root


def start(launcher, root, name, *more):
    """A launcher's process that trains into a folder of this name."""
    words = (
        *(sys.executable, *LAUNCHERS[launcher], "-m", "loralloc", "train"),
        *("--output_dir", root / name, "--model_name_or_path", root / "model"),
        *("--dataset_name", root / "data", "--num_train_epochs", "2", "--learning_rate", "1e-2"),
        *("--dtype", "float32", "--logging_steps", "1", "--lora_r", "2"),
        *("--per_device_train_batch_size", "4", "--num_rounds", "2", "--warmup_epochs", "0.5"),
        *("--recovery_epochs", "0.5", "--scoring_examples", "8", *more),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(
        [str(word) for word in words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_trains_one_model(launcher, root):
    process = start(launcher, root, launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("adapter:") == 1
    assert "in 2 processes" in " ".join(out.split())
    lines = (root / launcher / "metrics.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_refusal_is_one_sentence_under_a_launcher(launcher, root):
    process = start(launcher, root, f"{launcher}-refused", "--score", "no-such-score")
    _, err = process.communicate(timeout=300)
    assert process.returncode
    assert [line[:16] for line in err.splitlines() if "loralloc: " in line] == ["loralloc: error:"]
    assert "exitcode  : 2" in err or "exitcode: 2" in err


@pytest.mark.parametrize("signalled", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_to_the_launcher_reaches_all(signalled, root):
    name = signalled.name
    process = start("torchrun", root, name, "--num_train_epochs", "500")
    if not any(line.startswith("step 3 ") for line in process.stdout):
        pytest.fail(process.communicate()[1])
    process.send_signal(signalled)
    out, err = process.communicate(timeout=60)
    if signalled == signal.SIGTERM:
        assert " ".join(out.split()).count("as asked. Go on from checkpoint-") == 1
        assert list((root / name).glob("checkpoint-*/files.json"))
    else:
        assert err.count("loralloc: interrupted") == 1
