"""Run the Dockerfile's steps without Docker: `python app/check_dockerfile.py`, as root or not.

In an empty folder in place of the image's file system, with a new virtual environment in place of its Python, and only
the environment variables that the Dockerfile sets (and pip's own). COPY follows .dockerignore, RUN runs, and at the end
CMD is started and HEALTHCHECK's command asked until it agrees. What this cannot check: the base image itself, `useradd`
and `USER` (as root the steps run as user 1000 all the same, if that user can reach this Python), and the layers' cache.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_CONFIG_FILE",
    "PIP_RETRIES",
    "SSL_CERT_FILE",
    "HTTPS_PROXY",
    "https_proxy",
)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of each line, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def is_ignored(path: str, rules: list[str]) -> bool:
    """Docker's rule: the last line that matches the path or a folder above it decides."""
    ignored = False
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for rule in rules:
        pattern = rule.removeprefix("!")
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            ignored = not rule.startswith("!")
    return ignored


def context_files(root: Path = ROOT) -> list[str]:
    """What `COPY .` would bring into the image."""
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return [f for f in _files(root) if not is_ignored(f, rules)]


def _files(root: Path) -> list[str]:
    skipped = {".git", ".venv", "runs"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if Path(folder) != root or f not in skipped]
        found += [str((Path(folder) / f).relative_to(root)) for f in files]
    return sorted(found)


def copy(sources: list[str], target: Path) -> None:
    for file in context_files():
        for source in sources:
            source = source.rstrip("/")
            if source == ".":
                place = target / file
            elif file == source:
                place = target / Path(file).name
            elif file.startswith(f"{source}/"):
                place = target / file[len(source) + 1 :]
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, place)
            place.chmod(0o644)


def _starts(python: Path, user: dict) -> bool:
    try:
        return subprocess.run([python, "-c", ""], **user).returncode == 0
    except PermissionError:
        return False


def main() -> int:
    image = Path(tempfile.mkdtemp(prefix="image-"))
    image.chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", image / "python"], check=True)
    drop = {"user": 1000, "group": 1000, "extra_groups": []} if os.geteuid() == 0 else {}
    if drop and not _starts(image / "python" / "bin" / "python", drop):
        print(f"as root: user 1000 cannot reach {Path(sys.executable).resolve()}", flush=True)
        drop = {}
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"PATH": f"{image / 'python' / 'bin'}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    folder, health, process = image, "", None

    def own() -> None:
        if drop:
            subprocess.run(["chown", "-R", "1000:1000", image], check=True)

    try:
        for name, rest in instructions((ROOT / "Dockerfile").read_text()):
            began = time.monotonic()
            if name == "ENV":
                for pair in shlex.split(rest):
                    key, _, value = pair.partition("=")
                    value = value.replace("$PATH", environment["PATH"])
                    environment[key] = value.replace("/home/user", f"{image}/home/user")
            elif name == "WORKDIR":
                folder = Path(f"{image}{rest}")
                folder.mkdir(parents=True)
            elif name == "COPY":
                *sources, target = (part for part in rest.split() if not part.startswith("--"))
                copy(sources, folder / target)
            elif name == "RUN" and not rest.startswith("useradd"):
                own()
                # A virtual environment has no user site; its own place is what --user is in the image.
                command = rest.replace("pip install --user", "pip install")
                subprocess.run(command, shell=True, cwd=folder, env=environment, check=True, **drop)
            elif name == "HEALTHCHECK":
                health = rest.split("CMD ", 1)[1]
            elif name == "CMD":
                own()
                process = subprocess.Popen(json.loads(rest), cwd=folder, env=environment, **drop)
                while subprocess.run(health, shell=True, env=environment, capture_output=True).returncode:
                    if process.poll() is not None or time.monotonic() - began > 600:
                        raise SystemExit("CMD was started, but HEALTHCHECK never agreed")
                    time.sleep(1)
            print(f"{time.monotonic() - began:7.1f} s  {name} {rest[:90]}", flush=True)
        size = sum(f.stat().st_size for f in image.rglob("*") if f.is_file()) / 1e9
        print(f"all steps ran; the folder has {size:.1f} GB")
        return 0
    finally:
        if process:
            process.terminate()
            process.wait(30)
        shutil.rmtree(image, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
