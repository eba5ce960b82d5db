"""Start the demo: `python app/main.py`, then open the address it prints. Also the entry of a Gradio Space."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a Space installs requirements.txt, not this project
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from app.examples import FILE, Examples  # noqa: E402
from app.queries import Limits, style_axes  # noqa: E402
from app.service import OutlineService  # noqa: E402
from tkpo.errors import TKPOError  # noqa: E402

SHIPPED = ("sft", "dpo", "tkpo")  # on every axis
ALSO_SHIPPED = ("contrast",)  # shown where there is one


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    limits = Limits(
        article_tokens=args.article_tokens,
        waiting=args.queue,
        jobs_per_visitor=args.jobs_per_visitor,
        per_minute=args.per_minute,
    )
    try:
        adapters = adapter_folders(args.adapters, args.axes_file)
        service = OutlineService(args.model, adapters, args.dtype, args.device, limits, args.axes_file)
        from app.server import application, bind, serve

        examples = Examples.load(args.examples, args.model, service.adapters, service.axes)
        listening = bind(args.host, args.port)
    except TKPOError as error:
        print(f"app: {error}", file=sys.stderr)
        return 2
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    print(f"The page is at http://{args.host}:{listening.getsockname()[1]} (stop it with Ctrl+C)", flush=True)
    serve(application(service.start(), ROOT, examples), listening)
    return 0


def adapter_folders(given: list[str] | None, axes_file: str | None = None) -> dict[str, Path]:
    """Adapter name → folder. Default: the shipped ones, "axis/method".

    TKPOError for a folder that is none, names its adapter for files that are damaged, or a name given twice.
    """
    axes = dict.fromkeys(axis.name for axis in style_axes(axes_file).values())
    if given is None:
        if axes_file:
            raise TKPOError(
                f"--axes-file {axes_file} needs --adapters: the shipped adapters write the shipped styles only"
            )
        shipped = ROOT / "paper" / "checkpoints"
        folders = {f"{a}/{m}": shipped / a / m for a in axes for m in SHIPPED}
        folders |= {f"{a}/{m}": shipped / a / m for a in axes for m in ALSO_SHIPPED if (shipped / a / m).is_dir()}
    else:
        folders = {}
        for entry in given:
            name, folder = _named_folder(entry, list(axes))
            if name in folders:
                raise TKPOError(f"--adapters: two adapters are called {name}: give each a name of its own")
            folders[name] = folder
    return {name: check_adapter(name, folder) for name, folder in folders.items()}


def _named_folder(entry: str, axes: list[str]) -> tuple[str, Path]:
    """(name, folder) of METHOD=FOLDER or AXIS/METHOD=FOLDER."""
    name, _, folder = entry.partition("=")
    axis, _, method = name.rpartition("/")
    if not folder or not method or axis not in ("", *axes):
        known = " or ".join(axes)
        raise TKPOError(f"--adapters {entry}: expected METHOD=FOLDER or AXIS/METHOD=FOLDER, where AXIS is {known}")
    if method == "base":
        raise TKPOError("--adapters: base is the model without an adapter and always there; choose another name")
    return name, Path(folder)


def check_adapter(name: str, path: Path) -> Path:
    """The adapter's folder, once its files could be read; TKPOError names the adapter, the file and the fault."""
    from safetensors import SafetensorError, safe_open

    from tkpo.adapters import adapter_folder

    folder = adapter_folder(path)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise TKPOError(f"adapter {name}: {config} is damaged ({error}): copy the adapter anew") from error
    try:
        with safe_open(weights, "pt") as tensors:
            if not any("lora_" in key for key in tensors.keys()):  # noqa: SIM118
                raise TKPOError(f"adapter {name}: {weights} holds no LoRA weights: give the folder of an adapter")
    except (OSError, SafetensorError) as error:
        raise TKPOError(f"adapter {name}: {weights} is damaged ({error}): copy the adapter anew") from error
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="app/main.py", description="Outlines of SFT, DPO and TKPO side by side.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="preset, folder or hub id; default %(default)s")
    parser.add_argument(
        "--adapters",
        nargs="+",
        metavar="[AXIS/]METHOD=FOLDER",
        help="adapters in place of the shipped ones; without AXIS an adapter serves all styles",
    )
    parser.add_argument(
        "--axes-file", metavar="FILE", help="YAML table of axes of your own: its styles in place of the shipped ones"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available, else cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--queue", type=int, default=20, metavar="N", help="requests that may wait; default 20")
    parser.add_argument(
        "--jobs-per-visitor",
        type=int,
        default=Limits.jobs_per_visitor,
        metavar="N",
        help="requests that one session or address may have waiting or running; 0 is no limit; default %(default)s",
    )
    parser.add_argument(
        "--per-minute",
        type=int,
        default=Limits.per_minute,
        metavar="N",
        help="requests that one address may make in a minute; 0 is no limit; default %(default)s",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        default=FILE,
        metavar="FILE",
        help="stored examples by app/make_examples.py; shown if these adapters wrote them; default: the shipped ones",
    )
    parser.add_argument(
        "--article-tokens",
        type=int,
        default=Limits.article_tokens,
        metavar="N",
        help="tokens of an article that the model is given; default %(default)s",
    )
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="default %(default)s")
    parser.add_argument(
        "--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)), help="default %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
