"""What a user installs: the wheel and the sdist, without the repository beside them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("build", reason="needs: bash install.sh dev")


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel that was built from the sdist, which was built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tkpo", source / "tkpo", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def tkpo(built, tmp_path_factory):
    """Runs the installed package in a folder that has nothing but what the user put there."""
    site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("home")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=home)

    def call(*arguments, module="tkpo"):
        return run(sys.executable, "-m", module, *arguments, cwd=home, PYTHONPATH=str(site))

    call.home, call.site = home, site
    return call


def test_wheel_and_sdist_hold_the_package_and_its_files(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    sources = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "tkpo").rglob("*") if p.suffix in (".py", ".yaml", ".json")
    }
    assert "tkpo/configs/deepspeed/zero3.json" in sources
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {*sources, "tkpo/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tkpo"}
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {*sources, "tkpo/py.typed", "LICENSE", "README.md", "pyproject.toml"} <= inside


def test_the_versions_agree(tkpo):
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert tkpo("--version") == f"tkpo {version}\n"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_check_train_and_generate_from_any_folder(tkpo, tiny_folder):
    requirement = "Generate a structured hierarchical outline for the given document. Requirement: {}. Input:\n"
    records = [
        {"instruction": requirement.format(style), "input": f"Topic: {topic}", "output": f"1. {topic}\n2. The end"}
        for style, topic in (("literary", "Salt"), ("objective", "Bread"), ("literary", "Rain"), ("objective", "Iron"))
    ]
    (tkpo.home / "mine.json").write_text(json.dumps(records))
    assert "4 records, 0 faults" in tkpo("data", "check", "mine.json")
    train = ["--model", tiny_folder, "--dataset", "mine.json", "--axis", "language_style", "--device", "cpu"]
    tkpo("train", "--method", "tkpo", *train, "--output", "run", "--epochs", "1")
    assert (tkpo.home / "run" / "model" / "adapter_model.safetensors").is_file()
    generate = ["generate", "--topic", "Salt", "--style", "literary", "--model", tiny_folder, "--json"]
    outlines = json.loads(tkpo(*generate, "--max-new-tokens", "8", "--adapters", "base", "mine=run"))
    assert list(outlines) == ["base", "mine"]


def test_tkpo_imports_where_resource_is_absent(tmp_path):
    """`resource` exists on Unix only; what the libraries do on this system is not the question."""
    hidden = "import sys, peft, trl, datasets; sys.modules['resource'] = None; import tkpo.generation, tkpo.runs"
    run(sys.executable, "-c", hidden, cwd=tmp_path, PYTHONPATH=str(ROOT))


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))


def test_no_message_names_a_package_on_the_index_that_is_not_ours():
    """The name tkpo is not registered: `pip install tkpo` would bring somebody else's code."""
    for path in [*(ROOT / "tkpo").rglob("*.py"), *(ROOT / "app").glob("*.py"), *PAGES]:
        assert not re.search(r"pip install\s+(-\w+\s+)*['\"]?tkpo\b", path.read_text(encoding="utf-8")), path
