"""The snippets of README and docs/train.md below `<!-- runnable -->` run as they are written, on the preset `tiny`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from random_adapters import random_adapter

ROOT = Path(__file__).parent.parent
SNIPPET = re.compile(r"^<!-- runnable -->\n```(\w+)\n(.*?)^```$", re.M | re.S)
PAGES = {"README.md": 4, "docs/train.md": 4}  # how many snippets each has at least


def snippets(page):
    return SNIPPET.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def visitor(tiny_folder, tmp_path_factory):
    """A folder as a clone has it, but that the default base model and its shipped adapters are tiny ones."""
    home, commands = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("bin")
    (home / "data").symlink_to(ROOT / "data")
    for axis in ("language_style", "level_of_detail"):
        for seed, method in enumerate(("sft", "dpo", "tkpo")):
            random_adapter(home / "paper" / "checkpoints" / axis / method, seed)
    for name, module in (("tkpo", "-m tkpo "), ("python", "")):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TKPO_QWEN2_5_CODER_0_5B": str(tiny_folder),
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(language, text):
        command = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": [sys.executable, "-c", text]}[language]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=280)

    run.home = home
    return run


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_runs_as_written(visitor, page):
    found = snippets(page)
    assert len(found) >= PAGES[page]
    for language, text in found:
        done = visitor(language, text)
        assert done.returncode == 0, f"{page}:\n{text}\n{(done.stdout + done.stderr)[-3000:]}"


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_to_files(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (path.parent / t).exists()]
    assert not missing


def test_readme_stays_a_first_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 300
