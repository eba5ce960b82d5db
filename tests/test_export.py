"""Exported runs in the runtimes they are for: transformers, and llama.cpp by its wheel xllamacpp."""

import contextlib
import json
import urllib.request

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.random_adapters import random_adapter
from tkpo.attributes import get_axis
from tkpo.cli import main
from tkpo.data import make_record
from tkpo.errors import TKPOError
from tkpo.export import export, modelfile
from tkpo.generation import OutlineGenerator
from tkpo.gguf_file import write_model
from tkpo.presets import cache_dir, load_model, load_tokenizer

TEXT = "Requirement: literary.\n\n1. Salt, 12345 roads\r\n  2. 平遥古城，与票号的兴衰。 It's the END—naïve café\t🖋️  "
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.5, "vocab_size": 259}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
}


@contextlib.contextmanager
def llama_cpp(path, lora=None):
    """Asks llama.cpp's server, with a GGUF file loaded: ask("/completion", prompt=…)."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs: bash install.sh dev")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 1, 1
    params.warmup, params.verbosity = False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # by default float16
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)

    def ask(place, **content):
        request = urllib.request.Request(server.listening_address + place, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        server = params = None  # its threads end with it


def continued(ask, ids, length=24):
    asked = {"prompt": ids, "n_predict": length, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    return ask("/completion", **asked)["tokens"]


def greedy(model, ids, length=24):
    """transformers' own greedy tokens; one that ends the text is not counted, as llama.cpp does it."""
    with torch.no_grad():
        ids = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, pad_token_id=0)[0, len(ids) :]
    return [i for i in ids.tolist() if i != model.generation_config.eos_token_id]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("adapter") / "mine", seed=0)


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    return tiny_tokenizer("Requirement: literary. Topic: the sea")["input_ids"]


@pytest.fixture(scope="module")
def with_adapter(adapter):
    """PEFT's model, the adapter beside the weights."""
    return PeftModel.from_pretrained(load_model("tiny", "float32", "cpu"), adapter).eval()


# ---- merged


def test_the_merged_folder_is_a_plain_model_with_the_adapters_logits(adapter, with_adapter, prompt, tmp_path):
    folder = export(adapter, "merged", tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is Qwen2ForCausalLM
    ids = torch.tensor([prompt])
    torch.testing.assert_close(model(ids).logits, with_adapter(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template == load_tokenizer("tiny").chat_template


def test_merged_is_bfloat16_by_default_and_beside_the_run(adapter):
    folder = export(adapter, "merged")
    assert folder == adapter.with_name("mine-merged")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


# ---- GGUF in llama.cpp


def test_the_gguf_writes_what_our_own_decoder_writes(adapter, tmp_path, capsys):
    path = tmp_path / "mine.gguf"
    assert main(["export", str(adapter), "--to", "gguf", "--dtype", "float32", "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    generator = OutlineGenerator("tiny", {"mine": adapter}, "float32", "cpu")
    assert generator.engine == "decoder"
    record = make_record(get_axis("language_style"), "literary", "Salt roads")
    (expected,) = generator.generate([record], "mine", max_new_tokens=24, guard="none")
    with llama_cpp(path) as ask:
        tokens = continued(ask, generator.prompt_ids(record))
    assert generator.tokenizer.decode(tokens).strip() == expected.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_and_without_an_adapter(family, tiny_tokenizer, prompt, tmp_path):
    """Float files: the same tokens as transformers; the LoRA file on the base's file: those of PEFT."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = greedy(model, prompt)
    tuned = get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.eval().save_pretrained(tmp_path / "run")
    changed = greedy(tuned, prompt)
    assert changed != plain

    where = {"output": tmp_path / "base.gguf", "dtype": "float32"}
    base = export(tmp_path / "base", "gguf", **where)
    own = export(tmp_path / "run", "lora-gguf", model=str(tmp_path / "base"))
    whole = export(tmp_path / "run", "gguf", tmp_path / "whole.gguf", str(tmp_path / "base"), "float32")
    with llama_cpp(base) as ask:
        assert continued(ask, prompt) == plain
        assert ask("/tokenize", content=TEXT)["tokens"] == tiny_tokenizer(TEXT)["input_ids"]
    with llama_cpp(base, lora=own) as ask:
        assert continued(ask, prompt) == changed
    with llama_cpp(whole) as ask:
        assert continued(ask, prompt) == changed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_files_hold_the_same_weights_to_their_precision(dtype, tmp_path):
    path = export("tiny", "gguf", tmp_path / "tiny.gguf", dtype=dtype)
    weights = load_model("tiny", "float32", "cpu").state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = torch.tensor(
        gguf.dequantize(tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type)
    )
    expected = weights["model.layers.1.mlp.down_proj.weight"]
    assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert path.stat().st_size < 0.6 * 4 * sum(w.numel() for w in weights.values()) + 20_000
    with llama_cpp(path) as ask:
        assert len(continued(ask, [72, 101, 108], 4)) > 0


def test_llama_cpp_reads_text_and_chat_as_qwens_tokenizer_does(qwen_tokenizer, tmp_path):
    torch.manual_seed(0)
    small = {**SHAPE, "vocab_size": 151936, "hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(**small)).save_pretrained(tmp_path / "base")
    qwen_tokenizer.save_pretrained(tmp_path / "base")
    path = export(tmp_path / "base", "gguf")
    messages = [{"role": "user", "content": TEXT.strip()}]
    with llama_cpp(path) as ask:
        assert ask("/tokenize", content=TEXT)["tokens"] == qwen_tokenizer(TEXT)["input_ids"]
        rendered = ask("/apply-template", messages=messages)["prompt"]
    assert rendered == qwen_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.skipif(not (cache_dir() / "models" / "small").is_dir(), reason="preset small is not in the cache")
def test_a_trained_model_writes_the_same_outline(tmp_path):
    path = export("small", "gguf", tmp_path / "small.gguf", dtype="float32")
    generator = OutlineGenerator("small", {}, "float32", "cpu")
    record = make_record(get_axis("language_style"), "literary", "Salt roads")
    (expected,) = generator.generate([record], "base", max_new_tokens=32, guard="none")
    with llama_cpp(path) as ask:
        tokens = continued(ask, generator.prompt_ids(record), 32)
    assert len(expected) > 40 and generator.tokenizer.decode(tokens).strip() == expected.strip()


# ---- Ollama


@pytest.mark.parametrize("system", [None, "You are terse."])
def test_the_modelfiles_template_is_the_tokenizers(tiny_tokenizer, system):
    text = modelfile(tiny_tokenizer)
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    default = text.split('SYSTEM """')[1].split('"""')[0]
    written = (
        template.replace("{{ if .System }}", "").replace("{{ end }}", "").replace("{{ .System }}", system or default)
    )
    written = written.replace("{{ .Prompt }}", "Hello").split("{{ .Response }}")[0]
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "Hello"})
    assert written == tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert 'PARAMETER stop "<|im_end|>"' in text and text.startswith("FROM ./model.gguf\n")


def test_ollamas_folder_has_the_model_beside_the_modelfile(adapter, tmp_path):
    folder = export(adapter, "ollama", tmp_path / "served")
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "model.gguf"}
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["general.architecture"].contents() == "qwen2"


# ---- what is refused


def test_what_cannot_be_exported_is_refused(adapter, tiny_tokenizer, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model("tiny", "float32", "cpu"), dora).save_pretrained(tmp_path / "dora")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ((tmp_path / "gpt2", "gguf"), "gpt2"),
        ((tmp_path / "dora", "lora-gguf"), "DoRA"),
        (("tiny", "lora-gguf"), "whole model"),
        (("tiny", "onnx"), "merged, gguf, lora-gguf, ollama"),
        (("tiny", "merged", tmp_path / "x", None, "q8_0"), "q8_0"),
        (("tiny", "gguf", tmp_path / "there"), "exists"),
        (("tiny", "gguf", tmp_path / "file" / "x.gguf"), "cannot write"),
        ((tmp_path / "nothing", "merged"), "no run"),
        ((tmp_path / "there", "merged"), "no adapter in"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, said in cases:
        with pytest.raises(TKPOError, match=said):
            export(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left behind"


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path, tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    with pytest.raises(TKPOError, match="splits text"):
        write_model(load_model("tiny", "float32", "cpu"), tokenizer, tmp_path, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
