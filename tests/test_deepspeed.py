"""Two DeepSpeed processes on the CPU (gloo) against one process without DeepSpeed, on the same global batches."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from tkpo.attributes import get_axis
from tkpo.data import make_record
from tkpo.distributed import drop_stale_locks
from tkpo.errors import TKPOError
from tkpo.launch import deepspeed_file
from tkpo.presets import resolve_model
from tkpo.runs import RunConfig, last_checkpoint, run
from tkpo.training import TKPOConfig, TKPOTrainer

pytest.importorskip("deepspeed", reason="needs: bash install.sh deepspeed")

WORKER = Path(__file__).with_name("deepspeed_worker.py")
TOPICS = ("Moss after rain", "A clock in the attic", "Why bread rises", "The night bus")
# name: method, model, what differs. Each is run by two processes under a stage, and by one without DeepSpeed.
SHARED = {"prompt_order": "article_first", "share_prefix": True, "micro_batch_size": 2}
RUNS = {
    "tkpo": {"method": "tkpo"},
    "sft": {"method": "sft"},
    "lora": {"method": "tkpo", "finetuning": "lora", "gradient_checkpointing": True},
    "shared": {"method": "tkpo", **SHARED},
    "contrast": {"method": "contrast", **SHARED},
    "tied": {"method": "tkpo", "model": "TIED", "gradient_checkpointing": True},
}
CASES = [
    *(("tkpo", stage) for stage in ("zero0", "zero2", "zero3", "zero3-offload")),
    *(("sft", stage) for stage in ("zero0", "zero2", "zero3", "zero3-offload")),
    *(("lora", stage) for stage in ("zero2", "zero3")),
    *((name, stage) for name in ("shared", "contrast") for stage in ("zero2", "zero3")),
    ("tied", "zero3"),
]


pytestmark = pytest.mark.timeout(1200)  # DeepSpeed compiles its kernels the first time


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Records with responses of unequal lengths, the preset tiny, and a copy of it whose embedding is tied."""
    folder = tmp_path_factory.mktemp("deepspeed")
    axis, records = get_axis("language_style"), []
    for number, topic in enumerate(TOPICS):
        for attribute in axis.flip:
            record = make_record(axis, attribute, topic)
            records.append({**record, "id": f"t{number}", "output": "1. It" + f"\n2. {topic}" * (1 + number % 3)})
    (folder / "records.json").write_text(json.dumps(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TKPO_CACHE", str(folder / "cache"))
        tiny = resolve_model("tiny", progress=False)
        shutil.copytree(tiny, folder / "tied")
        config = json.loads((tiny / "config.json").read_text())
        (folder / "tied" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        (path,) = (folder / "tied").glob("*.safetensors")
        kept = {name: value for name, value in load_file(path).items() if name != "lm_head.weight"}
        save_file(kept, path, metadata={"format": "pt"})
        yield folder


def settings(home, name, output, **changes):
    values = {
        "dataset": str(home / "records.json"),
        "axis": "language_style",
        "model": "tiny",
        "finetuning": "full",
        "batch_size": 4,
        "max_length": 2048,
        "epochs": 2,
        "learning_rate": 2e-3,
        "sampler": "topk",  # the same draws, however the batch is shared out
        "dtype": "float32",
        "device": "cpu",
        "output": str(home / output),
        **RUNS[name],
        **changes,
    }
    if values["model"] == "TIED":
        values["model"] = str(home / "tied")
    return values


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    command = [sys.executable, "-m", *map(str, command)]
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop them when it is full
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return process, output


def printed(output):
    output.seek(0)
    return output.read()[-4000:]


def torchrun(*command):
    """Start a command in two processes."""
    return start("torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)


def by_deepspeed(*command):
    """Start a module in two processes by DeepSpeed's own launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--num_gpus", 2, "--master_port", port, "--no_local_rank", "--module")
    return start("deepspeed.launcher.runner", *flags, *command)


@pytest.fixture(scope="module")
def two_processes(home):
    """The folder in which two processes have run every case."""
    cases = [settings(home, name, f"2-{name}-{stage}", deepspeed=stage) for name, stage in CASES]
    cases.append({"rows": uneven_rows(), "model": "tiny", "output": str(home / "2-rows"), "deepspeed": "zero3"})
    cases.append(settings(home, "tkpo", "2-whole", **KILLED))
    (home / "cases.json").write_text(json.dumps(cases))
    finish(torchrun(WORKER, home / "cases.json"))
    return home


def finish(started):
    """Wait for it; whatever happens here, it does not stay behind."""
    process, output = started
    try:
        process.wait()
    finally:
        process.terminate()  # the launchers take their workers along
    assert process.returncode == 0, printed(output)


@pytest.fixture(scope="module")
def one_process(home):
    """Runs a case without DeepSpeed, once."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = home / f"1-{name}"
            run(RunConfig(**settings(home, name, done[name].name)))
        return done[name]

    return get


def curve(folder, *keys):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if "loss" in line]


def weights(folder):
    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_processes_follow_the_curve_of_one(two_processes, one_process, name, stage):
    ours, theirs = two_processes / f"2-{name}-{stage}", one_process(name)
    keys = ["loss", "cross_entropy"]
    keys += {"sft": [], "contrast": ["contrast"]}.get(name, ["preference", "reward", "accuracy"])
    keys += ["grad_norm"] if stage != "zero0" else []  # which does not say it
    expected = curve(theirs, *keys)
    assert len(expected) == 4 and expected[-1][0] < expected[0][0]
    assert curve(ours, *keys) == [pytest.approx(line, rel=1e-4) for line in expected]
    found, wanted = weights(ours), weights(theirs)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].shape == value.shape
        # Adam's first steps divide by gradients that may be nothing but rounding
        close = torch.isclose(found[key].float(), value.float(), rtol=1e-2, atol=2e-4).float().mean()
        assert close > 0.995, key


def test_a_run_leaves_a_plain_model(two_processes):
    folder = two_processes / "2-tied-zero3" / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    model, report = Qwen2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    metrics = json.loads((folder.parent / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(p.numel() for p in model.parameters())


# ---- a process whose batch has no response


def uneven_rows():
    """Six token rows; the third one, which the first process gets while the other has a response, has none."""
    rows = []
    for number in range(6):
        prompt, response = list(range(20, 30 + number)), list(range(60, 64 + 5 * number))
        ids = prompt + response
        labels = [-100] * len(prompt) + ([-100] * len(response) if number == 2 else response)
        rows.append(
            {"input_ids": ids, "labels": labels, "flipped_input_ids": [7, *ids], "flipped_labels": [-100, *labels]}
        )
    return rows


def train_rows(model, rows, output, deepspeed=None):
    """A TKPOTrainer that has trained on encoded rows in their order, two to a step."""
    from transformers import AutoTokenizer

    from tkpo.distributed import join

    path = deepspeed_file(deepspeed) if deepspeed else None
    joined = join("cpu", path, torch.float32, output)
    world = int(os.environ.get("WORLD_SIZE", 1)) if deepspeed else 1
    folder = resolve_model(model)
    args = TKPOConfig(
        output_dir=output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2 // world,
        num_train_epochs=1,
        learning_rate=1e-3,
        sampler="topk",
        use_cpu=True,
        deepspeed=path,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    loaded = Qwen2ForCausalLM.from_pretrained(folder)
    trainer = TKPOTrainer(loaded, args, rows, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    del joined
    return trainer


def test_a_process_without_response_tokens_keeps_step_with_the_other(two_processes, tmp_path):
    found = json.loads((two_processes / "2-rows" / "found.json").read_text())
    alone = [line for line in train_rows("tiny", uneven_rows(), str(tmp_path)).state.log_history if "loss" in line]
    keys = ("loss", "cross_entropy", "preference", "grad_norm")
    assert len(alone) == 3
    for ours, theirs in zip(found["log"], alone, strict=True):
        assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-4)


def test_nothing_is_left_behind_by_the_flipped_pass(two_processes):
    found = json.loads((two_processes / "2-rows" / "found.json").read_text())
    assert found["held"] == []  # every weight is split again, lm_head's too
    assert found["own_forward"] == [""]  # the patched model's own; the head's is gone again
    layers = {name: count for name, count in found["hooks"].items() if name.endswith("mlp")}
    assert len(layers) == 2 and len(set(layers.values())) == 1


# ---- killed, and taken up again

KILLED = {"deepspeed": "zero3", "sampler": "multinomial", "epochs": 6, "save_steps": 4, "seed": 3}


def test_killed_processes_end_like_ones_left_in_peace(home, two_processes):
    config = settings(home, "tkpo", "2-killed", **KILLED)
    flags = [part for key, value in config.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = ("tkpo.cli", "train", *flags)
    process, output = torchrun("-m", *command)
    log, deadline = home / "2-killed" / "log.jsonl", time.monotonic() + 300
    try:
        while not (last_checkpoint_of_two(log.parent) and len(curve(log.parent, "loss")) >= 5):
            assert process.poll() is None and time.monotonic() < deadline, printed(output)
            time.sleep(0.02)
    finally:
        process.kill()
        kill_workers(process)
    assert not (home / "2-killed" / "metrics.json").exists()
    plain = converted(Path(last_checkpoint_of_two(home / "2-killed")), home / "plain")
    finish(by_deepspeed(*command))
    assert json.loads((home / "2-killed" / "metrics.json").read_text())["steps"] == 12
    assert curve(home / "2-killed", "loss") == curve(home / "2-whole", "loss")
    ours, theirs = weights(home / "2-killed"), weights(home / "2-whole")
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    # the checkpoint, put together by DeepSpeed's own script, is a model on the way there
    ids = torch.arange(20, 60).unsqueeze(0)
    assert torch.isfinite(plain(input_ids=ids).logits).all()
    moved = [float((p - theirs[name]).abs().max()) for name, p in plain.state_dict().items() if name in theirs]
    assert len(moved) == len(theirs) and 0 < max(moved) < 0.1


def last_checkpoint_of_two(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        return last_checkpoint(folder)


def kill_workers(process):
    """SIGKILL for the workers too, which torchrun has put into sessions of their own."""
    process.wait()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"/2-killed" in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def converted(checkpoint, folder):
    """The checkpoint as a plain safetensors model, by the script that DeepSpeed puts into it."""
    script = [sys.executable, checkpoint / "zero_to_fp32.py", checkpoint, folder, "--safe_serialization"]
    subprocess.run(list(map(str, script)), check=True, capture_output=True)
    shutil.copy(checkpoint / "config.json", folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


# ---- configurations and launch


@pytest.mark.parametrize("name", ["zero0", "zero2.json", "zero3", "zero3-offload"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_shipped_configurations_are_deepspeeds(name, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(deepspeed_file(name)).config
    text = json.dumps(config).replace('"auto"', '"AUTO"')
    filled = json.loads(text)
    filled.update(train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    filled["gradient_clipping"] = 1.0
    for kind in ("fp16", "bf16"):
        filled[kind]["enabled"] = kind == dtype
    filled["zero_optimization"] = {k: v for k, v in filled["zero_optimization"].items() if v != "AUTO"}
    read = DeepSpeedConfig(filled)
    assert read.zero_optimization_stage == int(name[4])
    assert (read.float16_config.enabled, read.bfloat16_config.enabled) == (dtype == "fp16", dtype == "bf16")
    offload = read.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in name)


def test_a_wrong_configuration_or_launch_is_explained(home, monkeypatch):
    with pytest.raises(TKPOError, match=r"'zero9'.*zero0, zero2, zero3, zero3-offload"):
        deepspeed_file("zero9")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TKPOError, match="torchrun"):
        run(RunConfig(**settings(home, "tkpo", "unlaunched", deepspeed="zero3")))
    assert not (home / "unlaunched").exists()


def test_a_checkpoint_counts_when_every_process_has_written_it(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rng_state_0.pth").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(tmp_path) is None
    (folder / "rng_state_1.pth").touch()
    assert last_checkpoint(tmp_path) == str(folder)


def test_a_build_lock_of_a_killed_process_is_no_obstacle(tmp_path, monkeypatch):
    """torch's own baton takes and holds the lock, in a process that is then killed."""
    folder = tmp_path / "py311_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    hold = (
        "import sys, time\nfrom torch.utils.file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[1]).try_acquire()\nprint('held', flush=True)\ntime.sleep(300)"
    )
    command = [sys.executable, "-c", hold, str(folder / "lock")]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        drop_stale_locks()
        assert (folder / "lock").exists()
        process.kill()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    drop_stale_locks()
    assert (folder / "lock").exists()  # perhaps the other node's
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    drop_stale_locks()
    assert not (folder / "lock").exists()
