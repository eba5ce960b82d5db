"""`accelerate launch` with FSDP2 on two CPU processes: the curve and the weights of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tkpo.attributes import get_axis
from tkpo.data import make_record
from tkpo.run_config import RunConfig
from tkpo.runs import run

HERE = Path(__file__).parent
LAUNCH = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
LAUNCH += ["--fsdp_state_dict_type", "FULL_STATE_DICT", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Two configurations; the sampler is one that does not draw, as each process draws for itself."""
    home = tmp_path_factory.mktemp("fsdp")
    axis, samples = get_axis("language_style"), []
    for number, topic in enumerate(("Moss after rain", "A clock in the attic", "Why bread rises")):
        for attribute in axis.flip:
            output = f"1. {topic}, {attribute}\n2. The long breath" + "\n3. End" * number
            samples.append({**make_record(axis, attribute, topic), "id": f"t{number}", "output": output})
    (home / "samples.json").write_text(json.dumps(samples))
    common = {"dataset": str(home / "samples.json"), "axis": "language_style", "model": "tiny", "sampler": "topk"}
    common |= {"batch_size": 2, "learning_rate": 2e-3, "dtype": "float32", "device": "cpu", "max_length": 2048}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TKPO_CACHE", str(home / "cache"))
        yield home, {name: {**common, "finetuning": name} for name in ("lora", "full")}


def test_two_fsdp_processes_train_like_one(cases):
    home, configs = cases
    for name, config in configs.items():
        run(RunConfig(**config, output=str(home / f"{name}-one")))
    (home / "cases.json").write_text(json.dumps([{**c, "output": str(home / f"{n}-two")} for n, c in configs.items()]))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCH]
    done = subprocess.run(
        [*command, str(HERE / "fsdp_worker.py"), str(home / "cases.json")],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, file in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        one, two = (
            [json.loads(line) for line in (home / f"{name}-{n}" / "log.jsonl").read_text().splitlines()]
            for n in ("one", "two")
        )
        curves = [[line["loss"] for line in log if "loss" in line] for log in (one, two)]
        assert len(curves[0]) == 3 and curves[1] == pytest.approx(curves[0], rel=1e-5)
        assert json.loads((home / f"{name}-two" / "metrics.json").read_text())["split"]
        ours, theirs = (load_file(home / f"{name}-{n}" / "model" / file) for n in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert (ours[key].float() - theirs[key].float()).abs().max() < 1e-4, key
