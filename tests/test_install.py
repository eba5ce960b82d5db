"""install.sh: what it says of an environment it cannot use, and which lock it hands to pip; nothing is downloaded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = re.search(r"^torch==.*$", (ROOT / "requirements.lock").read_text(), re.M)[0]

# Stands in for an environment's Python of another version: notes what pip is asked for and installs nothing.
PYTHON = """#!{real}
import sys
from pathlib import Path
sys.version_info = {version}
arguments = sys.argv[1:]
if arguments[0] == "-c":
    exec(arguments[1])
elif arguments[:3] == ["-m", "pip", "install"]:
    with Path(__file__).with_name("asked").open("a") as asked:
        print(*arguments[3:], file=asked)
elif arguments == ["--version"]:
    print("Python " + ".".join(map(str, sys.version_info)))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the script and the files that it reads."""
    for name in ("install.sh", "pyproject.toml", "requirements.lock", "requirements-llamafactory.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make_environment(folder, version):
    (folder / "bin").mkdir(parents=True)
    for name, text in (
        ("python", PYTHON.format(real=sys.executable, version=version)),
        ("tkpo", "#!/bin/sh\necho tkpo\n"),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def install(project, *arguments, path=None, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("VENV", "PYTHON")}
    kept["PATH"] = path or "/usr/bin:/bin"  # without nvidia-smi, as on CI
    command = [shutil.which("bash"), "install.sh", *arguments]
    return subprocess.run(command, cwd=project, env={**kept, **environment}, capture_output=True, text=True)


def asked(folder):
    return (folder / "bin" / "asked").read_text().splitlines()


@pytest.mark.parametrize("version", [(3, 11, 7), (3, 13, 0)])
def test_the_environments_python_decides_the_lock(project, version):
    make_environment(project / ".venv", version)
    done = install(project, "dev,app")
    assert done.returncode == 0, done.stderr
    torch, setuptools, package = asked(project / ".venv")
    assert torch.split()[-1] == f"{TORCH}+cpu" and "--no-deps" in torch, "the CPU build, and nothing with it"
    for line in (setuptools, package):
        assert "--constraint requirements.lock" in line
    assert package.endswith("--no-build-isolation --editable .[dev,app]"), "an isolated build asks the network"


def test_python_3_10_gets_no_lock_and_is_told(project):
    make_environment(project / ".venv", (3, 10, 13))
    done = install(project)
    assert done.returncode == 0 and "Python 3.10" in done.stdout
    assert not any("--constraint" in line for line in asked(project / ".venv"))


def test_llamafactory_gets_a_lock_and_an_environment_of_its_own(project):
    make_environment(project / ".venv-llamafactory", (3, 11, 7))
    done = install(project, "llamafactory,test")
    assert done.returncode == 0, done.stderr
    lines = asked(project / ".venv-llamafactory")
    assert lines[1].endswith("--no-deps llamafactory==0.9.5"), "its torchvision and torchaudio need CUDA"
    assert all("requirements-llamafactory.lock" in line for line in lines[2:])
    assert lines[-1].endswith("--editable .[test]")
    assert not any("torchvision" in line or "torchaudio" in line for line in lines)


def test_with_a_gpu_torch_and_llamafactory_come_whole(project):
    make_environment(project / ".venv-llamafactory", (3, 11, 7))
    tools = project / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = install(project, "llamafactory", path=f"{tools}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    lines = asked(project / ".venv-llamafactory")
    assert lines[0].endswith(TORCH) and "download.pytorch.org" not in lines[0]
    assert lines[-1].endswith("--editable .[llamafactory]") and len(lines) == 3


def test_a_dead_interpreter_is_noticed(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(project / "removed" / "python3.9")
    done = install(project)
    assert done.returncode == 1
    assert ".venv/bin/python no longer runs" in done.stderr and "delete the folder .venv" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {"PYTHON": "/nowhere/python3"}, "no /nowhere/python3 found"),
        (("app,llamafactory",), {}, "install them apart"),
    ],
)
def test_what_cannot_be_installed_is_said(project, arguments, environment, said):
    done = install(project, *arguments, **environment)
    assert done.returncode == 1 and said in done.stderr and not (project / ".venv").exists()


def test_an_old_python_is_refused(project):
    make_environment(project / ".venv", (3, 9, 18))
    done = install(project)
    assert done.returncode == 1 and "too old" in done.stderr and not (project / ".venv/bin/asked").exists()
