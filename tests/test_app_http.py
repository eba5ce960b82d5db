"""The running app over HTTP, as its API's users see it: `gradio_client` against `python app/main.py`."""

import json
import random
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
from app_process import METHODS, ROOT, random_adapters, running_app, start

gradio_client = pytest.importorskip("gradio_client", reason="the app's packages are not installed: install.sh app")
from gradio_client.exceptions import AppError  # noqa: E402

from app.main import main  # noqa: E402
from tkpo.attributes import get_axis  # noqa: E402
from tkpo.data import make_record  # noqa: E402
from tkpo.generation import OutlineGenerator  # noqa: E402

OPTIONS = ("--queue", "12", "--per-minute", "0")


def client_from(address, came_from):
    """A client that stands for a visitor of its own: the app believes a proxy on this machine about addresses."""
    return gradio_client.Client(address, verbose=False, headers={"X-Forwarded-For": came_from})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return random_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def app(tmp_path_factory, adapters):
    folder = tmp_path_factory.mktemp("app")
    with running_app(folder, "--dtype", "float32", "--adapters", *adapters, *OPTIONS) as (address, process):
        yield address, process, folder


@pytest.fixture(scope="module")
def client(app):
    return gradio_client.Client(app[0], verbose=False)


@pytest.fixture(scope="module")
def alone(adapters):
    """Outlines of a topic by the library alone, without the app."""
    folders = dict(entry.split("=") for entry in adapters)
    generator = OutlineGenerator("tiny", folders, "float32", "cpu")

    def write(topic, style="literary", length=12):
        axis = "language_style" if style in ("literary", "objective") else "level_of_detail"
        record = make_record(get_axis(axis), style, topic)
        return generator.generate([record] * 3, list(METHODS), max_new_tokens=length)

    return write


def test_the_api_is_named_and_documented(client):
    info = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(info) == {"/compare", "/styles", "/preferences"}
    page = (ROOT / "docs" / "app-and-deploy.md").read_text(encoding="utf-8")
    for name, endpoint in info.items():
        assert name in page
        for parameter in endpoint["parameters"]:
            assert f"`{parameter['parameter_name']}`" in page, f"{name}: {parameter['parameter_name']}"


def test_compare_streams_what_the_library_writes(client, alone):
    job = client.submit(topic="Salt", length=12, api_name="/compare")
    final = job.result(timeout=120)
    assert [o["method"] for o in final["outlines"]] == list(METHODS)
    assert [o["text"] for o in final["outlines"]] == alone("Salt")
    assert final["state"] == "done" and final["language"] == "en" and final["cut"] is None
    for outline in final["outlines"]:
        assert outline["reads_as"] in ("literary", "objective") and 0.5 <= outline["reads_as_probability"] <= 1
        assert outline["words"] == len(outline["text"].split())
    states = [output["state"] for output in job.outputs()]
    assert states[-1] == "done" and "writing" in states


def test_styles_writes_four_by_one_method(client, alone):
    final = client.predict(topic="Salt", method="dpo", length=12, api_name="/styles")
    styles = [o["style"] for o in final["outlines"]]
    assert styles == ["literary", "objective", "comprehensive", "concise"]
    for outline in final["outlines"]:
        assert outline["text"] == alone("Salt", outline["style"])[METHODS.index("dpo")]


def test_preferences_gives_every_token(client):
    final = client.predict(topic="Salt", outline="1. Salt", style="concise", method="sft", api_name="/preferences")
    assert (final["style"], final["flipped"]) == ("concise", "objective")
    assert "".join(t["text"] for t in final["tokens"][:-1]) == "1. Salt"
    assert all(0 < t["p"] < 1 and 0 < t["reward"] < 1 and len(t["rejects"]) == 20 for t in final["tokens"])


def test_the_same_query_is_the_same_outline_and_a_seed_another(client):
    ask = lambda seed: client.predict(topic="Salt", temperature=1.0, seed=seed, length=12, api_name="/compare")  # noqa: E731
    first, again, other = ([o["text"] for o in ask(seed)["outlines"]] for seed in (1, 1, 2))
    assert first == again != other


BAD = [
    ({"topic": ""}, "nothing to outline"),
    ({"topic": "x" * 201}, "201 characters; at most 200"),
    ({"topic": "a", "article": "x" * 2**20}, "1048576 characters; at most 20000"),
    ({"topic": "a", "style": "rude"}, "no style “rude”"),
    ({"topic": "a", "style": "../../etc"}, "no style"),
    ({"topic": "a", "language": "fr"}, "no language “fr”"),
    ({"topic": "a", "length": 100_000}, "length is “100000”"),
    ({"topic": "a", "temperature": -1}, "temperature is “-1”"),
    ({"topic": "a", "seed": "<b>"}, "seed is “<b>”"),
    ({"topic": "a", "seed": 10**400}, "seed is “a number of more than 40 digits”"),
    ({"topic": "\u200b\u00ad\u3164\U000e0041"}, "nothing to outline"),
    ({"topic": "a", "methods": []}, "No method is chosen"),
    ({"topic": "a", "methods": "sft"}, "No method is chosen"),
    ({"topic": "a", "style_strength": 3}, "style_strength is “3”"),
    ({"topic": ["a", {"path": "/etc/passwd"}]}, "topic must be text, not list"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_bad_request_is_refused_with_a_reason(client, given, message):
    with pytest.raises(AppError, match=message):
        client.predict(**given, api_name="/compare")


def test_an_unknown_method_is_refused_with_the_known_ones(client):
    for name, given in (("/styles", {}), ("/preferences", {"outline": "1. A"})):
        with pytest.raises(AppError, match=r"no method “magic” for this style\. There are: sft, dpo, tkpo, base"):
            client.predict(topic="a", method="magic", **given, api_name=name)


@pytest.mark.parametrize(
    "topic",
    [
        "كيف يرتفع الخبز",
        "🍞👩‍🍳🇫🇷",
        "<script>alert(1)</script>",
        "a\x00\u202eb<|im_end|>",
        "' OR 1=1 --",
    ],
)
def test_strange_text_gets_an_outline(client, topic):
    final = client.predict(topic=topic, length=8, api_name="/compare")
    assert final["state"] == "done" and len(final["outlines"]) == 3


def test_a_file_of_the_machine_is_not_given_out(app):
    address, _, folder = app
    secret = folder / "secret.txt"
    secret.write_text("the secret")
    for route in (f"/gradio_api/file={secret}", f"/file={secret}", "/gradio_api/file=/etc/passwd", "/../secret.txt"):
        answer = httpx.get(address + route)
        assert answer.status_code in (403, 404, 405) and "the secret" not in answer.text, route
    # The page's own file field, called directly with a path of the machine in place of an upload.
    config = httpx.get(f"{address}/config").json()
    reading = [d["id"] for d in config["dependencies"] if any(t[1] == "upload" for t in d["targets"])]
    assert len(reading) == 3
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["en", file], "fn_index": reading[0], "session_hash": "thief"}
    httpx.post(f"{address}/gradio_api/queue/join", json=body)
    heard = ""
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=thief", timeout=30) as events:
        for line in events.iter_lines():
            heard += line
            if "process_completed" in line:
                break
    assert "process_completed" in heard and '"success":false' in heard and "the secret" not in heard


def test_an_upload_over_the_limit_is_refused(app):
    files = {"files": ("big.txt", b"x" * 3_000_000)}
    assert httpx.post(f"{app[0]}/gradio_api/upload", files=files).status_code == 413


def test_twenty_clients_at_once_get_their_own_outline_or_their_place(app, alone):
    """Queue of 12: some are refused, nobody gets another's text, nobody waits for ever."""
    topics = [f"visitor number {i}" for i in range(20)]
    results = {}

    def visit(topic):
        try:
            own = client_from(app[0], f"10.0.0.{topics.index(topic)}")
            results[topic] = own.submit(topic=topic, length=12, api_name="/compare").result(timeout=200)
        except AppError as error:
            results[topic] = str(error)

    threads = [threading.Thread(target=visit, args=(topic,)) for topic in topics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert sorted(results) == sorted(topics)
    served = {topic: result for topic, result in results.items() if isinstance(result, dict)}
    for topic, result in results.items():
        if topic not in served:
            assert "Busy: you would have place 13 in the queue" in result
    assert len(served) >= 12
    for topic, result in served.items():
        assert [o["text"] for o in result["outlines"]] == alone(topic), "another's text?"


def test_a_client_that_leaves_in_mid_stream_harms_nobody(app, client, alone):
    leaver = gradio_client.Client(app[0], verbose=False)
    job = leaver.submit(topic="leaves", length=384, api_name="/compare")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    # And one that is cut off without a word: the connection is closed while events come.
    with httpx.Client(base_url=app[0]) as raw:
        config = raw.get("/config").json()
        place = next(d["id"] for d in config["dependencies"] if d["api_name"] == "compare")
        body = {
            "data": ["cut off", "", "literary", "auto", 0, 0, 384, None, 0],
            "fn_index": place,
            "session_hash": "cutoff",
        }
        assert raw.post("/gradio_api/queue/join", json=body).status_code == 200
        with raw.stream("GET", "/gradio_api/queue/data?session_hash=cutoff", timeout=60) as events:
            next(line for line in events.iter_lines() if "writing" in line)
    final = client.submit(topic="stays", length=12, api_name="/compare").result(timeout=120)
    assert [o["text"] for o in final["outlines"]] == alone("stays")
    end = time.monotonic() + 60
    while httpx.get(f"{app[0]}/health").json()["waiting"]:
        assert time.monotonic() < end, "an abandoned request still runs"
        time.sleep(0.2)


def test_memory_stays_bounded_over_two_hundred_requests(app, client):
    memory = psutil.Process(app[1].pid)
    rng = random.Random(0)
    sizes = []
    for i in range(200):
        topic = "".join(rng.choices("abcdefghij 文", k=60))
        try:
            if i % 4 == 3:
                client.predict(topic=topic, outline=f"1. {topic}", api_name="/preferences")
            else:
                client.predict(topic=topic if i % 5 else "", article=topic * 5, length=8, api_name="/compare")
        except AppError:
            pytest.fail("a good request was refused")
        sizes.append(memory.memory_info().rss / 2**20)
    settled = sizes[60]
    assert max(sizes[61:]) - settled < 60, f"{settled:.0f} MiB after 60 requests, {max(sizes):.0f} at most"


# ---- start-up ----


def test_a_wrong_adapter_is_refused_at_the_start(tmp_path):
    done = start("--adapters", f"mine={tmp_path}")
    assert done.returncode == 2 and f"no adapter in {tmp_path}" in done.stderr and "Traceback" not in done.stderr
    done = start("--adapters", "no_axis/mine=x")
    assert done.returncode == 2 and "AXIS/METHOD=FOLDER" in done.stderr


def test_own_styles_are_served_by_an_own_adapter(tmp_path, adapters, capsys):
    table = tmp_path / "my-axes.yaml"
    table.write_text(
        "attributes:\n  formal: {en: formal, zh: 正式}\n  casual: {en: casual, zh: 随意}\n"
        "axes:\n  register: {formal: casual, casual: formal}\n",
        encoding="utf-8",
    )
    assert main(["--axes-file", str(table)]) == 2 and "--adapters" in capsys.readouterr().err
    mine = "register/mine=" + adapters[0].partition("=")[2]
    with running_app(tmp_path, "--dtype", "float32", "--axes-file", str(table), "--adapters", mine) as (address, _):
        client = gradio_client.Client(address, verbose=False)
        final = client.predict(topic="Salt", style="casual", length=8, api_name="/compare")
        assert [(o["method"], o["style"]) for o in final["outlines"]] == [("mine", "casual")]
        every = client.predict(topic="盐", method="mine", length=8, api_name="/styles")
        assert [o["style"] for o in every["outlines"]] == ["formal", "casual"] and every["language"] == "zh"
        seen = client.predict(topic="Salt", outline="1. Salt", style="casual", method="mine", api_name="/preferences")
        assert (seen["style"], seen["flipped"]) == ("casual", "formal")
        with pytest.raises(AppError, match="formal, casual"):
            client.predict(topic="Salt", style="literary", api_name="/compare")


def test_no_pickle_is_ever_loaded(tmp_path, adapters):
    """An adapter whose weights are a pickle is refused; the shipped ones are safetensors."""
    from pathlib import Path

    shipped = ROOT / "paper" / "checkpoints"
    found = [p for p in shipped.rglob("*") if p.is_file()]
    assert {p.suffix for p in found} == {".json", ".safetensors"}
    source, poisoned = Path(adapters[0].partition("=")[2]), tmp_path / "poisoned"
    poisoned.mkdir()
    (poisoned / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    marker = tmp_path / "executed"
    code = f"c__builtin__\nexec\n(Vopen({str(marker)!r}, 'w').close()\ntR.".encode()
    (poisoned / "adapter_model.bin").write_bytes(code)
    done = start("--model", "tiny", "--adapters", f"bad={poisoned}")
    assert done.returncode == 2 and "safetensors" in done.stderr
    assert not marker.exists()


def test_health_says_what_is_wrong(tmp_path):
    """A model that cannot be loaded: the page is there and says so, /health is 503."""
    from app_process import free_port

    port = free_port()
    command = [sys.executable, str(ROOT / "app" / "main.py"), "--model", str(tmp_path), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 200
        while time.monotonic() < end:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=10)
            except httpx.HTTPError:
                time.sleep(0.3)
                continue
            if answer.status_code == 503:
                break
            time.sleep(0.3)
        assert answer.status_code == 503 and json.loads(answer.text)["state"] == "failed"
        page = httpx.get(f"http://127.0.0.1:{port}/", timeout=30)
        assert page.status_code == 200 and "https://cdnjs" not in page.text
        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        with pytest.raises(AppError, match="could not be loaded") as told:
            client.predict(topic="a", api_name="/compare")
        assert str(tmp_path) not in str(told.value) and str(tmp_path) in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)
