"""What a Gradio Space and `docker build` will find: front matter, pins, sizes, and an image that has all it needs."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import yaml

from app.check_dockerfile import context_files, instructions, is_ignored

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"^([A-Za-z0-9_-]+)(==|>=)([^\s#]+)", re.M)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    return {normal(name): (kind, version) for name, kind, version in PIN.findall((ROOT / file).read_text())}


def front_matter():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n"), "a Space reads the front matter from the first line on"
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_a_spaces():
    space = front_matter()
    assert space["sdk"] == "gradio" and space["license"] == "apache-2.0"
    assert pins("requirements.txt")["gradio"] == ("==", str(space["sdk_version"]))
    assert space["python_version"] == "3.11", "as text: a bare 3.10 would be read as 3.1"
    assert (ROOT / space["app_file"]).is_file()
    assert len(space["short_description"]) <= 60
    assert space["colorFrom"] in COLOURS and space["colorTo"] in COLOURS


COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_the_pins_are_those_the_tests_run_with():
    lock = pins("requirements.lock")
    for name, (kind, version) in pins("requirements.txt").items():
        if kind == "==":
            assert lock[name] == ("==", version), name


def test_every_import_of_the_app_is_required():
    """Third-party modules that app/ and the library's modules name at their top, as distributions."""
    required = set(pins("requirements.txt"))
    known = importlib.metadata.packages_distributions()
    for path in [*(ROOT / "app").glob("*.py"), *(ROOT / "tkpo").glob("*.py")]:
        if path.name in OTHER:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"app", "tkpo"}:
                assert {normal(d) for d in known.get(name, [name])} & required, f"{path.name} imports {name}"


OTHER = {"estimate.py", "llamafactory.py"}  # not loaded by the app


def test_no_file_needs_large_file_storage():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [str(f) for f in files if f.is_file() and f.stat().st_size > 10_000_000]
    assert files and not large


def test_the_image_gets_what_the_app_reads_and_no_more():
    files = context_files()
    for needed in (
        "app/main.py",
        "app/page.css",
        "app/page.js",
        "app/examples/examples.json",
        "tkpo/configs/axes.yaml",
    ):
        assert needed in files
    for axis in ("language_style", "level_of_detail"):
        assert f"data/{axis}/train.en.json" in files
        for method in ("sft", "dpo", "tkpo"):
            assert f"paper/checkpoints/{axis}/{method}/adapter_model.safetensors" in files
    unwanted = [
        f for f in files if f.startswith((".git", ".venv", "runs", "tests", "data/corpus")) or "__pycache__" in f
    ]
    assert not unwanted
    assert sum((ROOT / f).stat().st_size for f in files) < 120e6


def test_ignore_rules_are_dockers():
    rules = ["*", "!app", "**/__pycache__", "app/secret"]
    ignored = {"x": True, "app/a.py": False, "app/__pycache__/a.pyc": True, "app/secret": True, "tests/app": True}
    assert {path: is_ignored(path, rules) for path in ignored} == ignored


def test_the_dockerfile_runs_as_user_1000_with_a_health_check_on_port_7860():
    steps = instructions((ROOT / "Dockerfile").read_text())
    names = [name for name, _ in steps]
    assert names[0] == "FROM" and steps[0][1] == f"python:{front_matter()['python_version']}-slim"
    assert names.index("USER") < names.index("COPY"), "nothing is copied or installed as root"
    assert "--uid 1000" in dict(steps)["RUN"] or any("--uid 1000" in rest for _, rest in steps)
    assert ("EXPOSE", "7860") in steps and "7860/health" in dict(steps)["HEALTHCHECK"]
    copied = [part for name, rest in steps if name == "COPY" for part in rest.split()[1:-1] if part != "."]
    assert all((ROOT / part).exists() for part in copied)
