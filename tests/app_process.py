"""The real app as a process of its own, on the tiny model with three random adapters."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from socket import socket

import httpx
from random_adapters import random_adapter

ROOT = Path(__file__).parent.parent
METHODS = ("sft", "dpo", "tkpo")


def random_adapters(root: Path) -> list[str]:
    """--adapters for three LoRA adapters that write different things."""
    return [f"{method}={random_adapter(root / method, seed)}" for seed, method in enumerate(METHODS)]


def free_port() -> int:
    with closing(socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(address: str, endpoint: str, data: dict, came_from: str = "127.0.0.1", seconds: float = 120) -> list[tuple]:
    """(event, data) pairs that a client gets who knows HTTP only: POST the call, then read its stream of events.

    came_from: the address that a proxy in front of the app would name.
    """
    headers = {"X-Forwarded-For": came_from}
    with httpx.Client(base_url=f"{address}/gradio_api", headers=headers, timeout=seconds) as http:
        answer = http.post(f"/call/v2/{endpoint}", json=data)
        answer.raise_for_status()
        events = http.get(f"/call/v2/{endpoint}/{answer.json()['event_id']}").text
    pairs = [dict(line.split(": ", 1) for line in event.split("\n")) for event in events.strip().split("\n\n")]
    return [(pair["event"], json.loads(pair["data"])) for pair in pairs if pair["event"] != "heartbeat"]


@contextmanager
def running_app(folder: Path, *options: str, model: str = "tiny", until: str = "ready"):
    """Starts `python app/main.py` in `folder` and yields (address, process) once /health names the state `until`."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app" / "main.py"), "--model", model, "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    with (folder / "app.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, process, folder / "app.log", until)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(*options: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """`python app/main.py` with options that make it end by itself."""
    command = [sys.executable, str(ROOT / "app" / "main.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def _wait(address: str, process: subprocess.Popen, log: Path, until: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the app ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{address}/health", timeout=10).json()["state"] == until:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise RuntimeError(f"the app was not {until} after {seconds} s:\n{log.read_text()[-3000:]}")


def chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
