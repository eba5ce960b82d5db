"""Outlines of many documents: killed and resumed by real processes, against what the generator writes document by
document."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from random_adapters import random_adapter

from tkpo.attributes import get_axis
from tkpo.bulk import Bulk, Column
from tkpo.cli import main
from tkpo.data import make_record
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator
from tkpo.sampling import Decoding
from tkpo.vllm_engine import VLLMEngine, why_not

STYLE, DETAIL = get_axis("language_style"), get_axis("level_of_detail")
COLUMNS = [Column("literary", STYLE, "mine", "mine"), Column("concise", DETAIL, "mine", "mine")]
SHORT = Decoding(max_new_tokens=6)
DOCUMENTS = [
    {"topic": "Salt", "article": "Salt came from the sea.\n\nThen from mines.", "id": "a"},
    {"article": "盐来自大海，后来来自矿山。"},
    {"topic": "Bread", "lang": "en", "id": 7},
    {"document": "Rain fell.\nIt stopped."},
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("adapter"), 0)


@pytest.fixture(scope="module")
def generator(adapter):
    return OutlineGenerator("tiny", {"mine": adapter}, "float32", "cpu")


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_document_gets_its_outlines(generator, tmp_path):
    documents, output = save(tmp_path / "docs.jsonl", DOCUMENTS), tmp_path / "new" / "out.jsonl"
    bulk = Bulk(documents, output, COLUMNS, SHORT, batch_size=3)
    assert bulk.run(generator, progress=False) == {"written": 8, "kept": 0, "rejected": 0}
    rows = {(row["line"], row["style"]): row for row in written(output)}
    assert len(rows) == 8 and [rows[n, "literary"].get("id") for n in (1, 2, 3, 4)] == ["a", None, 7, None]
    for (line, style), row in rows.items():
        given = DOCUMENTS[line - 1]
        article = given.get("article", given.get("document"))
        topic = given.get("topic") or article.splitlines()[0]
        record = make_record(STYLE if style == "literary" else DETAIL, style, topic, article)
        assert [row["outline"]] == generator.generate([record], "mine", max_new_tokens=6)
    settings = json.loads((tmp_path / "new" / "out.jsonl.settings.json").read_text())
    assert settings["guard"] == "structure-1" and settings["engine"] == "decoder"
    assert not bulk.rejected.exists()
    assert bulk.run(generator, progress=False) == {"written": 0, "kept": 8, "rejected": 0}


def test_rows_that_cannot_be_used_are_named_and_left_out(generator, tmp_path):
    bad = {
        2: (b"{broken", "not valid JSON"),
        3: (b'{"topic": "\xff"}', "not UTF-8 text (byte 11)"),
        5: (b'["a"]', "expected an object, found list"),
        6: (b'{"topic": 5}', "field 'topic' is int, not text"),
        7: (b'{"topic": " ", "article": null}', "neither an article nor a topic"),
        8: (b'{"topic": "a", "lang": "fr"}', "field 'lang' is 'fr'"),
        9: (b'{"topic": "\\ud800"}', "half a surrogate"),
    }
    good = {1: b'{"topic": "Salt"}', 4: b"", 10: b'\xef\xbb\xbf{"topic": "Sea"}'}
    lines = [bad[n][0] if n in bad else good[n] for n in range(1, 11)]
    (tmp_path / "docs.jsonl").write_bytes(b"\n".join(lines))
    bulk = Bulk(tmp_path / "docs.jsonl", tmp_path / "out.jsonl", COLUMNS[:1], SHORT)
    for kept in (0, 2):
        assert bulk.run(generator, progress=False) == {"written": 2 - kept, "kept": kept, "rejected": 7}
        assert sorted(row["line"] for row in written(bulk.output)) == [1, 10]
        assert [row["line"] for row in written(bulk.rejected)] == list(bad)
        assert all(bad[row["line"]][1] in row["error"] for row in written(bulk.rejected))


def test_sampled_outlines_do_not_depend_on_where_they_were_cut_off(generator, tmp_path):
    documents, decoding = save(tmp_path / "docs.jsonl", DOCUMENTS), Decoding(max_new_tokens=8, temperature=1.5, seed=3)
    made = []
    for name, keep in (("whole", None), ("cut", 3)):
        bulk = Bulk(documents, tmp_path / name, COLUMNS, decoding, batch_size=2)
        bulk.run(generator, progress=False)
        if keep:
            lines = bulk.output.read_bytes().splitlines(keepends=True)
            bulk.output.write_bytes(b"".join(lines[:keep]) + lines[keep][:12])
            assert bulk.run(generator, progress=False) == {"written": 8 - keep, "kept": keep, "rejected": 0}
        made.append(sorted(bulk.output.read_text(encoding="utf-8").splitlines()))
    assert made[0] == made[1]


def test_outlines_of_other_documents_or_settings_are_not_mixed(generator, tmp_path):
    documents, output = save(tmp_path / "docs.jsonl", DOCUMENTS), tmp_path / "out.jsonl"
    Bulk(documents, output, COLUMNS, SHORT).run(generator, progress=False)
    before = output.read_bytes()
    with pytest.raises(TKPOError, match="was made with other guard: give another --output, or --restart"):
        Bulk(documents, output, COLUMNS, Decoding(max_new_tokens=6, guard="none")).run(generator, progress=False)
    with pytest.raises(TKPOError, match="other columns"):
        Bulk(documents, output, COLUMNS[:1], SHORT).run(generator, progress=False)
    save(documents, DOCUMENTS[:2])
    with pytest.raises(TKPOError, match="other documents_sha256"):
        Bulk(documents, output, COLUMNS, SHORT).run(generator, progress=False)
    assert output.read_bytes() == before
    assert Bulk(documents, output, COLUMNS, SHORT).run(generator, restart=True, progress=False)["written"] == 4
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.jsonl", "cannot read"), ("empty.jsonl", "has no documents")):
        with pytest.raises(TKPOError, match=message):
            Bulk(tmp_path / name, tmp_path / "o", COLUMNS, SHORT).run(generator, progress=False)


def test_a_killed_run_is_resumed_and_writes_no_document_twice(generator, adapter, tmp_path):
    rows = [{"topic": f"Topic {n}", "article": "Salt and bread. " * (n % 5 + 1)} for n in range(40)]
    documents, output = save(tmp_path / "docs.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tkpo.cli", "generate", "--input", documents, "--output", output]
    command += ["--styles", "literary", "concise", "--adapters", f"mine={adapter}", "--model", "tiny"]
    command += ["--max-new-tokens", "6", "--batch-size", "2"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ})
    for _ in range(1200):
        if output.exists() and output.read_bytes().count(b"\n") >= 5:
            break
        assert started.poll() is None, started.stderr.read().decode()
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = output.read_bytes().count(b"\n")
    assert 5 <= kept < 80
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{80 - kept} outlines written, {kept} there already" in done.stdout
    assert "engine: decoder (vllm is not installed" in done.stderr
    found = {(row["line"], row["style"]): row["outline"] for row in written(output)}
    assert len(found) == len(written(output)) == 80
    Bulk(documents, tmp_path / "whole.jsonl", COLUMNS, SHORT).run(generator, progress=False)
    assert found == {(row["line"], row["style"]): row["outline"] for row in written(tmp_path / "whole.jsonl")}


# ---- the command line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topic", "x", "--output", "o"), "belong to --input"),
        (("--input", "d", "--style", "concise"), "--input needs --output"),
        (("--input", "d", "--output", "o", "--topic", "x"), "--input needs --output, and goes without --topic"),
        (("--input", "d", "--output", "o", "--adapters", "base", "--engine", "vllm"), "vllm is not installed"),
        (("--topic", "x", "--adapters", "base", "--engine", "vllm"), "use it with --input"),
        (("--topic", "x", "--adapters", "base", "--style-strength", "-1"), "style_strength must be between 0 and 10"),
        (
            ("--topic", "x", "--axis", "language_style", "--style", "concise"),
            "language_style has no attribute 'concise'",
        ),
        (("--topic", "x", "--style", "baroque"), "no attribute 'baroque'"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(args, message, capsys, monkeypatch):
    monkeypatch.setattr("tkpo.cli._generator", lambda *args: pytest.fail("loaded"))
    assert main(["generate", *(() if "--style" in args else ("--style", "literary")), "--model", "tiny", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_all_styles_by_adapters_of_two_axes(monkeypatch, capsys, tmp_path):
    asked = {}

    def loaded(args, folders):
        asked["folders"] = folders
        return OutlineGenerator("tiny", dict.fromkeys(folders, adapter), "float32", "cpu")

    adapter = random_adapter(tmp_path / "adapter", 1)
    monkeypatch.setattr("tkpo.cli._generator", loaded)
    monkeypatch.setattr("tkpo.cli.shipped_adapter", lambda axis, method: tmp_path / axis / method)
    args = ["generate", "--topic", "Salt", "--style", "all", "--adapters", "tkpo", "base", "--max-new-tokens", "4"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["literary", "objective", "comprehensive", "concise"]
    assert all(list(outlines) == ["tkpo", "base"] for outlines in found.values())
    assert asked["folders"] == {
        "tkpo": tmp_path / "language_style" / "tkpo",
        "tkpo-level_of_detail": tmp_path / "level_of_detail" / "tkpo",
    }
    assert main(args) == 0
    assert "── LITERARY, TKPO" in capsys.readouterr().out


# ---- vLLM


def test_vllm_is_refused_with_the_reason(monkeypatch):
    assert "vllm is not installed" in why_not(Decoding(guard="none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in why_not(Decoding(guard="none"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "add --guard none" in why_not(Decoding())
    assert "style strength" in why_not(Decoding(guard="none", style_strength=1.0))
    assert why_not(Decoding(guard="none")) is None


def test_what_vllm_is_asked(adapter, generator, tmp_path, monkeypatch):
    """Its documented offline interface, recorded: prompts as our decoder reads them, one LoRA request per adapter."""
    calls, tokenizer = {}, generator.tokenizer

    class LLM:
        def __init__(self, **options):
            calls["options"] = options

        def generate(self, prompts, params, lora_request=None):
            calls["generate"] = prompts, params, lora_request
            ids = [*tokenizer("1. Salt\n")["input_ids"], tokenizer.eos_token_id]
            output = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])
            return [output] * len(prompts)

    record = lambda name: lambda *args, **options: (name, args, options)  # noqa: E731
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **options: options
    lora = types.ModuleType("vllm.lora.request")
    lora.LoRARequest = record("lora")
    for name, module in {"vllm": fake, "vllm.lora": types.ModuleType("vllm.lora"), "vllm.lora.request": lora}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("tkpo.vllm_engine.why_not", lambda decoding: None)
    engine = VLLMEngine("tiny", {"mine": adapter}, tensor_parallel=2)
    assert calls["options"]["tensor_parallel_size"] == 2 and calls["options"]["enable_lora"] is True
    documents, output = save(tmp_path / "docs.jsonl", DOCUMENTS[:1]), tmp_path / "out.jsonl"
    columns = [*COLUMNS, Column("concise", DETAIL, "base", "base")]
    decoding = Decoding(max_new_tokens=6, guard="none", temperature=0.5, min_p=0.1, seed=5)
    assert Bulk(documents, output, columns, decoding).run(engine, progress=False)["written"] == 3
    prompts, params, requests = calls["generate"]
    article = DOCUMENTS[0]["article"]
    asked = [make_record(axis, style, "Salt", article) for axis, style in ((STYLE, "literary"), (DETAIL, "concise"))]
    assert [p["prompt_token_ids"] for p in prompts[:2]] == [generator.prompt_ids(record) for record in asked]
    assert requests == [("lora", ("mine", 1, str(adapter)), {})] * 2 + [None]
    assert [p["seed"] for p in params] == [5, 6, 7] and {p["min_p"] for p in params} == {0.1}
    assert {(p["max_tokens"], p["temperature"], p["top_p"]) for p in params} == {(6, 0.5, 1.0)}
    assert {row["outline"] for row in written(output)} == {"1. Salt"}
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["engine"] == "vllm"
