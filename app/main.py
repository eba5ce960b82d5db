"""Start the demo: `python app/main.py`, then open the address it prints. Also the entry of a Gradio Space."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a Space installs requirements.txt, not this project
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from app.service import Limits, OutlineService, style_axes  # noqa: E402
from tkpo.errors import TKPOError  # noqa: E402

METHODS = ("sft", "dpo", "tkpo")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    try:
        limits = Limits(article_tokens=args.article_tokens, waiting=args.queue)
        adapters = adapter_folders(args.adapters, args.axes_file)
        service = OutlineService(args.model, adapters, args.dtype, args.device, limits, args.axes_file)
    except TKPOError as error:
        print(f"app: {error}", file=sys.stderr)
        return 2
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    from app.page import serve

    print(f"The page is at http://{args.host}:{args.port} (stop it with Ctrl+C)", flush=True)
    serve(service.start(), ROOT, args.host, args.port)
    return 0


def adapter_folders(given: list[str] | None, axes_file: str | None = None) -> dict[str, Path]:
    """Adapter name → folder. Default: the shipped ones, "axis/method"; TKPOError for a folder that is none."""
    from tkpo.adapters import adapter_folder

    axes = dict.fromkeys(axis.name for axis in style_axes(axes_file).values())
    if given is None:
        if axes_file:
            raise TKPOError(
                f"--axes-file {axes_file} needs --adapters: the shipped adapters write the shipped styles only"
            )
        folders = {f"{a}/{m}": ROOT / "paper" / "checkpoints" / a / m for a in axes for m in METHODS}
        return {name: adapter_folder(folder) for name, folder in folders.items()}
    folders = {}
    for entry in given:
        name, _, folder = entry.partition("=")
        axis, _, method = name.rpartition("/")
        if not folder or not method or axis not in ("", *axes):
            known = " or ".join(axes)
            raise TKPOError(f"--adapters {entry}: expected METHOD=FOLDER or AXIS/METHOD=FOLDER, where AXIS is {known}")
        if method == "base":
            raise TKPOError("--adapters: base is the model without an adapter and always there; choose another name")
        folders[name] = adapter_folder(folder)
    return folders


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
    parser.add_argument("--device", help="cpu or cuda; default: what there is")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: what torch chooses")
    parser.add_argument("--queue", type=int, default=20, metavar="N", help="requests that may wait; default 20")
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
