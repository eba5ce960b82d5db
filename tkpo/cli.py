"""The command line: `tkpo generate`, `train`, `estimate`, `llamafactory`, `evaluate`, `data`, `export`, `fetch`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from pathlib import Path

from tkpo import __version__
from tkpo.errors import TKPOError

EPILOG = """examples:
  tkpo generate --topic "How coral reefs bleach and recover" --style literary
  tkpo train --method sft  --dataset language_style
  tkpo train --method dpo  --dataset language_style --sft-adapter runs/sft-language_style-0
  tkpo train my-run.yaml --seed 1
  tkpo evaluate --adapter runs/tkpo-language_style-0 --dataset language_style --output scores.json
  tkpo data check my-records.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 (data check found faults), 2 (bad input), 130 (interrupted)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    try:
        return args.run(args) or 0
    except TKPOError as error:
        print(f"tkpo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output has gone
            return 0
        print(f"tkpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tkpo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tkpo",
        description="Token-level preference self-alignment: outlines of an article in the style you ask for.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tkpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_train(commands)
    _add_estimate(commands)
    _add_llamafactory(commands)
    _add_evaluate(commands)
    _add_data(commands)
    _add_export(commands)
    _add_fetch(commands)
    return parser


# ---- generate ------------------------------------------------------------------------------------------


def _add_generate(commands) -> None:
    p = commands.add_parser(
        "generate",
        help="write outlines of a topic, an article or a file of documents, by several adapters side by side",
        description="Write outlines of a topic (and article) in one style or several, by several adapters in one "
        "batch; an article is read once for its styles. With --input: outlines of every document of a JSON Lines "
        "file, resumed where an earlier call was cut off.",
    )
    p.add_argument("--topic", help="what the outline is about; needed unless --article or --input is given")
    p.add_argument("--article", metavar="FILE", help="text file with the article; - reads standard input")
    p.add_argument(
        "--style",
        "--styles",
        dest="styles",
        nargs="+",
        required=True,
        metavar="STYLE",
        help="literary, objective, comprehensive, concise, or one of your axes; several; or all",
    )
    p.add_argument("--lang", choices=("en", "zh"), help="default: the language of topic and article")
    p.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME[=FOLDER]",
        help="default: sft dpo tkpo as shipped, for the style's axis (tkpo with --input); NAME=FOLDER for your own; "
        "base: no adapter",
    )
    p.add_argument("--axis", help="which axis's adapters to use for a style that is in two; default the first")
    p.add_argument("--input", metavar="DOCS.jsonl", help="documents: an object per line with article, topic or both")
    p.add_argument("--output", metavar="OUTLINES.jsonl", help="with --input: JSON Lines file to write")
    p.add_argument("--restart", action="store_true", help="with --input: write the output anew")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="with --input: outlines at a time; default 8")
    _model_flags(p)
    _decoding_flags(p)
    _engine_flags(p, "vllm")
    p.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that share the model under vllm; default 1"
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object {adapter: outline}, of several styles {style: {adapter: outline}}",
    )
    p.set_defaults(run=_generate)


def _generate(args) -> None:
    decoding = _decoding(args)
    if args.input:
        _generate_bulk(args, decoding)
        return
    if args.output or args.restart:
        raise TKPOError("--output and --restart belong to --input: without it outlines are printed")
    from tkpo.bulk import topic_of
    from tkpo.data import make_record

    article = _read_article(args.article) if args.article else None
    topic = (args.topic or "").strip()
    if not topic and not article:
        raise TKPOError("give --topic, --article or both, or --input: there is nothing to outline")
    columns, folders = _columns(args, ["sft", "dpo", "tkpo"])
    records = [make_record(c.axis, c.style, topic or topic_of(article), article, args.lang) for c in columns]
    if args.engine == "vllm":
        raise TKPOError("--engine vllm writes no stream: use it with --input")
    generator = _generator(args, folders)
    stream = generator.stream(records, [column.adapter for column in columns], **dataclasses.asdict(decoding))
    several = len(args.styles) > 1 or args.styles == ["all"]
    if not args.json:
        _show([f"{c.style}, {c.label}" if several else c.label for c in columns], stream)
        return
    *_, texts = stream
    found: dict[str, dict] = {}
    for column, text in zip(columns, texts, strict=True):
        found.setdefault(column.style, {})[column.label] = text
    print(json.dumps(found if several else found[args.styles[0]], ensure_ascii=False, indent=2))


def _generate_bulk(args, decoding) -> None:
    from tkpo.bulk import Bulk

    if not args.output or args.topic or args.article or args.lang or args.json:
        raise TKPOError("--input needs --output, and goes without --topic, --article, --lang and --json")
    if args.batch_size < 1 or args.tensor_parallel < 1:
        raise TKPOError("--batch-size and --tensor-parallel must be at least 1")
    columns, folders = _columns(args, ["tkpo"])
    bulk = Bulk(Path(args.input), Path(args.output), columns, decoding, args.batch_size)
    engine = _bulk_engine(args, folders, decoding)
    counts = bulk.run(engine, args.restart)
    print(f"{args.output}: {counts['written']} outlines written, {counts['kept']} there already")
    if counts["rejected"]:
        print(f"{bulk.rejected}: {counts['rejected']} rows that could not be used, each with the reason")


def _bulk_engine(args, folders: dict[str, Path], decoding):
    """The engine that --engine names; `auto` says which one it took."""
    from tkpo.vllm_engine import VLLMEngine, why_not

    reason = why_not(decoding)
    if args.engine == "vllm" and reason:
        raise TKPOError(f"--engine vllm: {reason}")
    if args.engine == "vllm" or (args.engine == "auto" and not reason):
        options = {"axes_file": args.axes_file, "base_prompt_order": args.prompt_order}
        engine = VLLMEngine(args.model, folders, args.dtype, tensor_parallel=args.tensor_parallel, **options)
    else:
        engine = _generator(args, folders)
    if args.engine == "auto":
        print(f"engine: {engine.engine}" + (f" ({reason})" if reason else ""), file=sys.stderr)
    return engine


def _columns(args, methods: list[str]) -> tuple[list, dict[str, Path]]:
    """(one `tkpo.bulk.Column` per style and adapter, {the generator's name of an adapter: its folder})."""
    from tkpo.attributes import axis_of, get_axis, load_axes
    from tkpo.bulk import Column
    from tkpo.generation import BASE

    styles = args.styles
    if "all" in styles:
        axes = [get_axis(args.axis, args.axes_file)] if args.axis else load_axes(args.axes_file).values()
        styles = [attribute for axis in axes for attribute in axis.attributes]
    columns, names = [], {}
    for style in dict.fromkeys(styles):
        axis = get_axis(args.axis, args.axes_file) if args.axis else axis_of(style, args.axes_file)
        axis.instruction(style, next(iter(axis.phrases.get(style, {"en": ""}))))  # refuses a style of another axis
        for label, folder in _adapters(args.adapters or methods, axis.name).items():
            # Shipped adapters of one method differ between axes; the same folder is loaded once.
            name = (
                BASE
                if folder is None
                else names.setdefault(folder, label if label not in names.values() else f"{label}-{axis.name}")
            )
            columns.append(Column(style, axis, name, label))
    return columns, {name: folder for folder, name in names.items()}


def _read_article(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise TKPOError(f"cannot read article {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TKPOError(f"article {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not text.strip():
        raise TKPOError(f"article {path} is empty")
    return text.strip()


def shipped_adapter(axis: str, method: str) -> Path:
    """The adapter that comes with the project, under paper/checkpoints here or beside the package."""
    places = [root / "paper" / "checkpoints" / axis / method for root in (Path(), Path(__file__).parent.parent)]
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    raise TKPOError(
        f"no shipped adapter {method!r} for {axis}: looked in {' and '.join(map(str, places))}. Run in the project's "
        f"folder, or give your own: --adapters {method}=FOLDER"
    )


def _adapters(given: list[str], axis: str) -> dict[str, Path | None]:
    """name → folder; None for the base model."""
    folders: dict[str, Path | None] = {}
    for entry in given:
        name, _, folder = entry.partition("=")
        folders[name] = None if name == "base" else Path(folder) if folder else shipped_adapter(axis, name)
    return folders


def _show(names: list[str], stream) -> None:
    """Columns that grow on a terminal; elsewhere every outline below its name, once it is whole."""
    if sys.stdout.isatty():
        from rich.columns import Columns
        from rich.live import Live
        from rich.panel import Panel
        from rich.text import Text

        def columns(texts):
            panels = [Panel(Text(t), title=n.upper()) for n, t in zip(names, texts, strict=True)]
            return Columns(panels, equal=True, expand=True)

        with Live(columns([""] * len(names)), refresh_per_second=8) as live:
            for texts in stream:
                live.update(columns(texts))
        return
    *_, texts = stream
    for name, text in zip(names, texts, strict=True):
        print(f"── {name.upper()} " + "─" * max(3, 60 - len(name)) + f"\n{text}\n", flush=True)


# ---- train ---------------------------------------------------------------------------------------------


def _add_train(commands) -> None:
    from tkpo.run_config import RunConfig

    p = commands.add_parser(
        "train",
        help="train with SFT, TKPO, DPO, SimPO or ORPO, from flags or a YAML file",
        description="Train an adapter or a whole model. Flags override the YAML file, whose keys have the same names. "
        "An interrupted run resumes from its last checkpoint when the same command is given again.",
    )
    p.add_argument("config", nargs="?", help="YAML file with the keys below (with _ for -)")
    p.add_argument("--restart", action="store_true", help="delete what the run's folder holds and start over")
    for f in dataclasses.fields(RunConfig):
        flag = "--" + f.name.replace("_", "-")
        default = "" if f.default is None else f" (default {f.default})"
        if f.type == "bool":
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
        else:
            choices = f.metadata.get("choices")
            metavar = "{" + ",".join(choices) + "}" if choices else f.type.split(" | ")[0].upper()
            p.add_argument(flag, metavar=metavar, help=(f.metadata["help"] + default).replace("%", "%%"))
    p.set_defaults(run=_train)


def _train(args) -> None:
    from tkpo.run_config import RunConfig

    names = [f.name for f in dataclasses.fields(RunConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = RunConfig.load(args.config, **given)  # a wrong one is refused before the libraries are imported

    from tkpo.distributed import leave
    from tkpo.outputs import full_disk_named
    from tkpo.runs import run

    with full_disk_named(config.output):
        metrics = run(config, resume=not args.restart)
    print(f"{config.output}: {json.dumps(metrics)}")
    leave()


# ---- estimate ------------------------------------------------------------------------------------------


def _add_estimate(commands) -> None:
    p = commands.add_parser(
        "estimate",
        help="say what memory full fine-tuning will need, for TKPO and DPO",
        description="Memory of full fine-tuning in 16 bit with float32 Adam, one sample (or pair) a GPU at a time: "
        "DeepSpeed's estimate of the model states, and the loss's own arrays, counted. No weights are read.",
    )
    p.add_argument("--model", default="qwen2.5-3b", help="preset, folder or hub id; default qwen2.5-3b")
    p.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node; default 8")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    p.add_argument("--zero", type=int, choices=(0, 2, 3), default=3, help="ZeRO stage; default 3")
    p.add_argument("--offload", action="store_true", help="optimizer (and ZeRO-3's parameters) in host memory")
    p.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of a sample; default 4096")
    p.set_defaults(run=_estimate)


def _estimate(args) -> None:
    from tkpo.estimate import describe, estimate, table

    model = describe(args.model)
    found = estimate(model, args.gpus, args.nodes, args.zero, args.offload, args.length)
    where = f"{args.nodes} x {args.gpus} GPUs" if args.nodes > 1 else f"{args.gpus} GPUs"
    about = f"{where}, ZeRO-{args.zero}{' with offload' if args.offload else ''}, {args.length} tokens a sample"
    print(table(args.model, model, found, about))


# ---- llamafactory --------------------------------------------------------------------------------------


def _add_llamafactory(commands) -> None:
    p = commands.add_parser("llamafactory", help="train with LLaMA-Factory and the TKPO loss")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train",
        help="run a LLaMA-Factory YAML file that may have a section tkpo:",
        description="Runs LLaMA-Factory on its own YAML file; with a section tkpo: in it, its SFT stage trains with "
        "the TKPO loss. The same under torchrun: torchrun --nproc-per-node 8 -m tkpo.cli llamafactory train FILE",
    )
    train.add_argument(
        "config", help="YAML file, or one that tkpo ships: qwen_sft_tkpo.yaml, qwen_sft.yaml, qwen_dpo.yaml"
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="go over the file's keys; tkpo.tau=0.2")
    train.set_defaults(run=_llamafactory_train)


def _llamafactory_train(args) -> None:
    from tkpo.llamafactory import train

    train(args.config, args.overrides)


# ---- evaluate ------------------------------------------------------------------------------------------


def _add_evaluate(commands) -> None:
    p = commands.add_parser(
        "evaluate",
        help="predict a test file and score it",
        description="Greedy outlines for a data set's test file, with ROUGE-1/2/L, BLEU-4, control accuracy and "
        "structure validity, English and Chinese apart, written with the predictions as one JSON. Chinese text "
        "follows LLaMA-Factory's prediction protocol (jieba, rouge-chinese, character BLEU-4), English rouge-score "
        "with stemming and word BLEU-4, both with nltk's smoothing method 3.",
    )
    p.add_argument("--adapter", required=True, help="run or adapter folder; base: the model without an adapter")
    p.add_argument("--dataset", default="language_style", help="name in dataset_info.json or a JSON file")
    p.add_argument("--output", required=True, metavar="FILE", help="JSON file to write")
    p.add_argument("--axis", help="default: the data set's name")
    p.add_argument("--split", default="test", choices=("train", "validation", "test"))
    p.add_argument("--lang", choices=("en", "zh"), help="default: both")
    p.add_argument("--limit", type=int, metavar="N", help="so many samples a language, chosen by hash")
    p.add_argument("--data-dir", help="folder with dataset_info.json; default data")
    p.add_argument(
        "--style-data",
        metavar="FILE",
        help="training file of the style classifier; default: the axis's data set. With neither, no score *control*",
    )
    _model_flags(p)
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    _decoding_flags(p)
    _engine_flags(p)
    p.set_defaults(run=_evaluate)


def _evaluate(args) -> None:
    from tkpo.evaluation import evaluate
    from tkpo.generation import BASE

    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise TKPOError("--batch-size and --limit must be at least 1")
    decoding = dataclasses.asdict(_decoding(args))
    adapters = {} if args.adapter == BASE else {"adapter": args.adapter}
    generator = _generator(args, adapters)
    names = ("dataset", "axis", "split", "lang", "limit", "data_dir", "batch_size", "axes_file", "style_data")
    options = {name: getattr(args, name) for name in names}
    adapter = next(iter(adapters), BASE)
    result = evaluate(generator, adapter, args.output, **options, adapter_source=args.adapter, **decoding)
    print(score_table(result["scores"]))


def score_table(scores: dict) -> str:
    """Scores of each language as aligned text."""
    names = {"n": "samples", "rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "bleu4": "BLEU-4"}
    names |= {"control": "control", "log_odds": "odds", "valid": "valid", "level": "level", "loop": "loops"}
    lines = ["".join(f"{title:>9}" for title in ("", *names.values()))]
    for lang, values in scores.items():
        known = {key: values[key] for key in names}
        cells = ("-" if v is None else f"{v:.0f}" if key == "n" else f"{v:.2f}" for key, v in known.items())
        lines.append("".join(f"{cell:>9}" for cell in (lang, *cells)))
    return "\n".join(lines)


# ---- data ----------------------------------------------------------------------------------------------


def _add_data(commands) -> None:
    p = commands.add_parser("data", help="build and check data sets")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="write the data sets of every axis from a corpus")
    build.add_argument("--corpus", default="data/corpus", help="folder with *.jsonl; default data/corpus")
    build.add_argument("--out", default="data", help="folder to write; default data")
    build.add_argument("--axes-file", help="YAML table of attributes and axes of your own")
    build.set_defaults(run=_data_build)
    check = actions.add_parser(
        "check",
        help="say what is wrong with corpus, record, pairwise or dataset_info files",
        description="Names each fault with its file and record. With --axis, each record must also ask for one of the "
        "axis's attributes; with --model, the lengths in its tokens are shown, and what would be cut.",
    )
    check.add_argument("paths", nargs="+", metavar="PATH", help="file, or folder whose .json and .jsonl are read")
    check.add_argument("--axis", help="axis of the records; several with commas")
    check.add_argument("--axes-file", metavar="FILE", help="YAML table of attributes and axes of your own")
    check.add_argument("--model", help="preset, folder or hub id whose tokens are counted")
    check.add_argument("--max-length", type=int, default=4096, metavar="N", help="tokens of a sample; default 4096")
    check.set_defaults(run=_data_check)


def _data_build(args) -> None:
    from tkpo.data import build

    for name, count in build(args.corpus, args.out, args.axes_file).items():
        print(f"{count:6d}  {Path(args.out) / name}")


def _data_check(args) -> int:
    from tkpo.attributes import get_axes, load_axes
    from tkpo.data import check

    if args.max_length < 1:
        raise TKPOError("--max-length must be at least 1")
    axes = get_axes(args.axis, args.axes_file) if args.axis else load_axes(args.axes_file) if args.axes_file else None
    count, faults = check(args.paths, axes)
    for fault in faults:
        print(fault)
    if args.model and not faults:
        from tkpo.encoding import measure
        from tkpo.presets import load_tokenizer

        print(measure(args.paths, load_tokenizer(args.model), args.max_length, axes))
    print(f"{count} records, {len(faults)} faults")
    return 1 if faults else 0


# ---- export --------------------------------------------------------------------------------------------


def _add_export(commands) -> None:
    p = commands.add_parser(
        "export",
        help="write a run for another runtime: transformers, llama.cpp, Ollama",
        description="Writes a run for another runtime: merged, a plain model folder for transformers, vLLM and TRL; "
        "gguf, one file for llama.cpp; lora-gguf, the adapter alone, to put on its base's gguf; ollama, a folder with "
        "model.gguf and Modelfile, for `ollama create`. For Qwen2, Qwen3, Llama and Mistral; merged for any model.",
    )
    p.add_argument("folder", metavar="RUN", help="folder of a run, adapter or model, or a preset (its base weights)")
    p.add_argument("--to", required=True, choices=("merged", "gguf", "lora-gguf", "ollama"))
    p.add_argument("--output", metavar="PATH", help="file or folder to write; default: beside RUN")
    p.add_argument("--model", help="base model of an adapter; default: what it records")
    p.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "q8_0"),
        help="of the weights; default float16 for gguf and ollama, bfloat16 for merged",
    )
    p.set_defaults(run=_export)


def _export(args) -> None:
    from tkpo.export import export

    print(export(args.folder, args.to, args.output, args.model, args.dtype))


# ---- fetch ---------------------------------------------------------------------------------------------


def _add_fetch(commands) -> None:
    p = commands.add_parser("fetch", help="get base models ready, so that other commands start at once")
    p.add_argument("models", nargs="+", metavar="MODEL", help="preset (tiny, small, qwen2.5-coder-0.5b, …) or hub id")
    p.set_defaults(run=_fetch)


def _fetch(args) -> None:
    from tkpo.presets import resolve_model

    for model in args.models:
        print(f"{model}: {resolve_model(model)}")


def _decoding_flags(p) -> None:
    """The fields of `tkpo.sampling.Decoding`, which must not be imported before a command needs it."""
    p.add_argument("--max-new-tokens", type=int, default=384, metavar="N", help="default 384")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    p.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="with a temperature: drop tokens less likely than P times the likeliest; default 0: top-p 0.95",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="for a temperature above 0; default 0")
    p.add_argument(
        "--guard",
        choices=("structure", "none"),
        default="structure",
        help="structure (default) ends outlines and headings that go round in circles; none",
    )
    p.add_argument(
        "--style-strength",
        type=float,
        default=0.0,
        metavar="G",
        help="flip-guided decoding: 0 (default) is off, up to 2 is sensible; costs a second row per outline",
    )


def _engine_flags(p, *more: str) -> None:
    p.add_argument(
        "--prompt-order",
        choices=("instruction_first", "article_first"),
        default="instruction_first",
        help="of the base model's prompts; an adapter's stand in the order that it was trained on",
    )
    p.add_argument(
        "--engine",
        choices=("auto", "decoder", "transformers", *more),
        default="auto",
        help="decoder: the project's own, for Qwen2 in float32 on a CPU"
        + ("; vllm: on GPUs, for --input" if more else "")
        + "; default auto: the best that fits",
    )


def _decoding(args):
    """TKPOError for a value outside its range."""
    from tkpo.sampling import Decoding

    return Decoding(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)})


def _generator(args, adapters: dict):
    from tkpo.generation import OutlineGenerator

    options = {"axes_file": args.axes_file, "base_prompt_order": args.prompt_order, "engine": args.engine}
    return OutlineGenerator(args.model, adapters, args.dtype, args.device, **options)


def _model_flags(p) -> None:
    p.add_argument("--axes-file", metavar="FILE", help="YAML table of attributes and axes of your own")
    p.add_argument("--model", default="qwen2.5-coder-0.5b", help="preset, folder or hub id the adapters belong to")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--device", help="cpu or cuda; default: what there is")


if __name__ == "__main__":
    sys.exit(main())
