"""The running app among rude visitors, over plain HTTP: who leaves, never reads, asks too much, or sends slowly.

Visitors' addresses are those that a proxy on this machine would name: the app believes it.
"""

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from app_process import ask, random_adapters, running_app, start

pytest.importorskip("gradio", reason="the app's packages are not installed: install.sh app")

READER = """
import sys, httpx
address, session, came_from = sys.argv[1:]
http = httpx.Client(base_url=address, headers={"X-Forwarded-For": came_from}, timeout=60)
place = next(d["id"] for d in http.get("/config").json()["dependencies"] if d["api_name"] == "compare")
article = "salt and bread and " * 200  # long, so that the app is busy for some seconds
body = {"data": ["Salt", article, "literary", "auto", 0, 0, 384, None, 1], "fn_index": place, "session_hash": session}
assert http.post("/gradio_api/queue/join", json=body).status_code == 200
with http.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
    for line in events.iter_lines():
        print(line, flush=True)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    adapters = random_adapters(tmp_path_factory.mktemp("adapters"))
    folder = tmp_path_factory.mktemp("app")
    options = ("--queue", "6", "--per-minute", "12")
    with running_app(folder, "--dtype", "float32", "--adapters", *adapters, *options) as (address, _):
        yield address


def waiting(address) -> int:
    return httpx.get(f"{address}/health").json()["waiting"]


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def reader(address, session, came_from):
    """A process that asks for long outlines and reads them, once the app writes or lets it wait."""
    command = [sys.executable, "-c", READER, address, session, came_from]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if any(state in line for state in ("waiting", "reading", "writing")):
            return process
    raise AssertionError("the reader ended before the app answered")


def test_a_killed_client_frees_its_place(address):
    """Whether it is being served or waits behind another."""
    first, second = reader(address, "killed-1", "10.1.0.1"), reader(address, "killed-2", "10.1.0.2")
    for client in (second, first):
        client.send_signal(signal.SIGKILL)
        client.wait()
    wait_until(lambda: waiting(address) == 0, 2.0, "two seconds after they were killed their places are still kept")


def test_requests_that_nobody_reads_leave_the_next_visitor_served(address):
    with httpx.Client(base_url=address, headers={"X-Forwarded-For": "10.2.0.1"}) as http:
        config = http.get("/config").json()
        place = next(d["id"] for d in config["dependencies"] if d["api_name"] == "compare")
        for i in range(25):
            body = {
                "data": ["Salt", "salt and bread " * 200, "literary", "auto", 0, 0, 384, None, 1],
                "fn_index": place,
            }
            http.post("/gradio_api/queue/join", json={**body, "session_hash": f"unread-{i}"})
    assert waiting(address) <= 2, "one address has two jobs at most"
    *_, (event, data) = ask(address, "compare", {"topic": "Salt", "length": 8}, "10.2.0.2")
    assert event == "complete" and data[0]["state"] == "done"
    wait_until(lambda: waiting(address) == 0, 8.0, "jobs whose stream nobody opened are still kept")


def test_a_session_and_an_address_have_two_jobs_at_most(address):
    clients = [reader(address, f"two-{i}", "10.3.0.1") for i in range(2)]
    try:
        *_, (event, data) = ask(address, "compare", {"topic": "Salt", "length": 8}, "10.3.0.1")
        assert (event, data["error"][:34]) == ("error", "You have 2 requests waiting or run")
    finally:
        for client in clients:
            client.kill()
            client.wait()
    wait_until(lambda: waiting(address) == 0, 3.0, "places are kept")


def test_an_address_has_so_many_requests_a_minute(address):
    told = [ask(address, "compare", {"topic": "Salt", "length": 8}, "10.4.0.1")[-1] for _ in range(13)]
    assert [event for event, _ in told] == ["complete"] * 12 + ["error"]
    assert "More than 12 requests in a minute from your address" in told[-1][1]["error"]
    *_, (event, _) = ask(address, "compare", {"topic": "Salt", "length": 8}, "10.4.0.2")
    assert event == "complete", "another address is not concerned"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"topic": ""}, "nothing to outline"),
        ({"topic": "\u200b\u2060\u00ad\u3164\U000e0041\U000e007f"}, "nothing to outline"),
        ({"topic": "a", "style": "rude"}, "no style “rude”"),
        ({"topic": "a", "seed": 10**400}, "seed is “a number of more than 40 digits”"),
        ({"topic": "a", "methods": ["magic"]}, "no method “magic”"),
    ],
)
def test_plain_http_gets_the_reason_of_a_refusal(address, given, reason):
    *_, (event, data) = ask(address, "compare", given, "10.5.0.1")
    assert event == "error" and reason in data["error"]


def test_slow_and_half_sent_requests_hold_nobody_up(address):
    host, port = address.removeprefix("http://").split(":")
    body = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{"
    half = []
    for beginning in 20 * (b"", b"GET / HTTP/1.1\r\nHost: x\r\n", body):
        half.append(socket.create_connection((host, int(port))))
        half[-1].sendall(beginning)
    began = time.monotonic()
    *_, (event, _) = ask(address, "compare", {"topic": "Salt", "length": 8}, "10.6.0.1")
    assert event == "complete"
    for connection in half:  # the app closes them: an empty answer, or one that refuses, and then the end
        connection.settimeout(40)
        while connection.recv(4096):
            pass
        connection.close()
    assert time.monotonic() - began < 40


def test_every_answer_has_security_headers_and_no_schema_is_given_out(address):
    for route in ("/", "/health", "/config", "/gradio_api/info", "/page.js", "/nothing"):
        headers = httpx.get(address + route).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "object-src 'none'" in policy
        assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    for route in ("/openapi.json", "/gradio_api/openapi.json", "/docs", "/redoc", "/monitoring"):
        assert httpx.get(address + route).status_code == 404, route
    for route in ("/gradio_api/file=http://example.com/x", "/gradio_api/file=https://example.com"):
        answer = httpx.get(address + route)
        assert "location" not in answer.headers and answer.status_code >= 400, "no redirect to another server"


def test_the_page_loads_from_no_other_server(address):
    page = httpx.get(address).text
    assert '<script src="https://' not in page and 'href="https://fonts' not in page


# ---- start-up


def test_a_taken_port_is_said_before_an_address_is(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = start("--model", "tiny", "--adapters", f"a={random_adapters(tmp_path)[0].split('=')[1]}", "--port", port)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "The page is at" not in done.stdout and "Traceback" not in done.stderr


def test_broken_adapters_are_named_at_the_start(tmp_path):
    one, two, three = (entry.split("=")[1] for entry in random_adapters(tmp_path))
    weights = tmp_path / "sft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "dpo" / "adapter_config.json").write_text('{"r": ')
    for name, folder in (("short", one), ("torn", two)):
        done = start("--model", "tiny", "--adapters", f"{name}={folder}")
        assert done.returncode == 2 and f"adapter {name}: " in done.stderr and "is damaged" in done.stderr
        assert "Traceback" not in done.stderr
    done = start("--model", "tiny", "--adapters", f"a={three}", f"a={three}")
    assert done.returncode == 2 and "two adapters are called a" in done.stderr


def test_a_failed_load_is_tried_again_when_somebody_asks(tmp_path):
    """The model's folder appears after the first try."""
    from tkpo.presets import resolve_model

    folder = tmp_path / "model"
    folder.mkdir()
    adapter = random_adapters(tmp_path / "adapters")[0]
    options = ("--dtype", "float32", "--adapters", adapter)
    with running_app(tmp_path, *options, model=str(folder), until="failed") as (address, _):
        assert httpx.get(f"{address}/health").status_code == 503
        *_, (event, data) = ask(address, "compare", {"topic": "Salt"}, "10.7.0.1")
        assert event == "error" and "could not be loaded" in data["error"] and str(folder) not in json.dumps(data)
        for file in resolve_model("tiny").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        time.sleep(10)  # so soon after a failure no other try is made
        *_, (event, data) = ask(address, "compare", {"topic": "Salt", "length": 8}, "10.7.0.2")
        assert event == "complete" and data[0]["state"] == "done"
        assert httpx.get(f"{address}/health").json()["state"] == "ready"
