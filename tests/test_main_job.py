"""The README's main job on the real base model and the shipped adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tkpo.outline import is_valid

ROOT = Path(__file__).parent.parent
ADAPTERS = sorted((ROOT / "paper" / "checkpoints").glob("*/*/adapter_config.json"))


@pytest.mark.timeout(1500)
def test_three_outlines_for_a_topic():
    command = [sys.executable, "-m", "tkpo.cli", "generate", "--topic", "How coral reefs bleach and recover"]
    command += ["--style", "literary", "--json", "--max-new-tokens", "160"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    outlines = json.loads(done.stdout)
    assert list(outlines) == ["sft", "dpo", "tkpo"]
    assert all(is_valid(text) for text in outlines.values()), outlines


def test_all_six_adapters_are_shipped_small_and_without_pickles():
    assert {tuple(path.parts[-3:-1]) for path in ADAPTERS} == {
        (axis, method) for axis in ("language_style", "level_of_detail") for method in ("sft", "dpo", "tkpo")
    }
    for path in ADAPTERS:
        files = {file.name for file in path.parent.iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "tkpo.json"}
        assert (path.parent / "adapter_model.safetensors").stat().st_size < 10_000_000


def test_adapters_record_their_base_and_hold_trained_weights():
    hashes = set()
    for path in ADAPTERS:
        made = json.loads((path.parent / "tkpo.json").read_text())
        assert (made["axis"], made["method"]) == path.parts[-3:-1]
        hashes.add(made["base_model_sha256"])
        assert json.loads(path.read_text())["base_model_name_or_path"] == "qwen2.5-coder-0.5b"
        weights = load_file(path.parent / "adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    assert len(hashes) == 1
