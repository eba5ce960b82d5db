"""Which modules an import brings: inference stays apart from training, and the command line starts at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded(code):
    """Names of the modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["tkpo.generation", "tkpo.adapters", "tkpo.environment"])
def test_inference_brings_nothing_of_training(module):
    names = loaded(f"import {module}")
    assert module in names
    training = {"transformers.trainer", "transformers.training_args", "trl", "datasets", "pandas", "deepspeed"}
    training |= {f"tkpo.{name}" for name in ("training", "runs", "pairwise", "callbacks", "distributed", "run_config")}
    assert not names & training


def test_the_command_lines_help_imports_neither_torch_nor_transformers():
    names = loaded("from tkpo.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass")
    assert "tkpo.run_config" in names
    assert not names & {"torch", "transformers", "peft", "datasets", "numpy"}


def test_generation_imports_where_there_is_no_resource_module():
    """As on Windows. The libraries come first: on Linux some of them import it themselves."""
    code = """
import sys, psutil, transformers, peft
transformers.PreTrainedModel, transformers.AutoModelForCausalLM
sys.modules["resource"] = None
import tkpo.generation, tkpo.evaluation
import tkpo.environment as environment
from types import SimpleNamespace
psutil.Process = lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**20))
assert environment.peak_memory_mib() == 3.0
"""
    assert "tkpo.generation" in loaded(code)
