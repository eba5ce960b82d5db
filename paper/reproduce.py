"""Regenerate the paper's tables and figures from stored results, and make the runs that are missing.

python paper/reproduce.py --all                    every table and figure, and the pages that quote them
python paper/reproduce.py --table 2 --format md    print and write one table
python paper/reproduce.py --list                   list tables and figures with the runs each still lacks
python paper/reproduce.py --run --table 2          make those runs first; an interrupted run resumes

python -m paper.reproduce is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

if not __package__:  # run as a file: the folder it stands in is the package
    _spec = importlib.util.spec_from_file_location("paper", Path(__file__).with_name("__init__.py"))
    sys.modules["paper"] = importlib.util.module_from_spec(_spec)

from paper.reproduction import grid, pages, rendering, store, tables
from paper.reproduction.experiments import Experiments
from paper.reproduction.grid import PRESET, Run
from tkpo.errors import TKPOError

PAPER = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 (bad input or a failed run), 130 (interrupted; finished runs are stored)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        _reproduce(_parser().parse_args(argv))
    except TKPOError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--table", type=int, nargs="+", choices=grid.TABLES, default=[], metavar="N", help="by number")
    what.add_argument("--figure", type=int, nargs="+", choices=grid.FIGURES, default=[], metavar="N", help="by number")
    what.add_argument("--all", action="store_true", help="every table and figure")
    what.add_argument("--list", action="store_true", help="list tables, figures and the runs that each lacks")
    what.add_argument("--run", action="store_true", help="first make the runs that the chosen tables and figures lack")
    what.add_argument("--only", nargs="+", metavar="RUN", help="with --run: only these runs, named as --list does")
    what.add_argument("--import-run", metavar="FOLDER", help="store a run of `tkpo train`, or base; with --predictions")
    what.add_argument("--predictions", metavar="FILE", help="what `tkpo evaluate` wrote for the imported run")
    how = parser.add_argument_group("how")
    how.add_argument("--preset", default=PRESET, help=f"entry of experiments/presets.yaml; default {PRESET}")
    how.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the experiments' own")
    how.add_argument("--device", help="cpu or cuda, for --run; default: cuda if available, else cpu")
    how.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="with --run: N runs at a time; their times are not reported"
    )
    formats = ("terminal", *rendering.FORMATS)
    how.add_argument("--format", choices=formats, default="terminal", help="of the printed tables")
    how.add_argument(
        "--results", metavar="DIR", type=Path, help="folder of results; tables, figures and training runs go beside"
    )
    how.add_argument("--output", metavar="DIR", type=Path, help="folder to write tables/ and figures/ to")
    how.add_argument("--experiments", metavar="DIR", type=Path, default=grid.FOLDER, help="default paper/experiments")
    return parser


def _reproduce(args) -> None:
    preset = grid.load_preset(args.preset, args.experiments)
    folder, output, work = _places(args.results, preset.name)
    output = {kind: args.output / kind if args.output else path for kind, path in output.items()}
    grids = grid.load_grids(args.experiments)
    questions = grid.load_questions(grids, args.experiments)
    experiments = Experiments(store.Store(folder, preset), grids, args.seeds, questions)
    if bool(args.import_run) != bool(args.predictions):
        raise TKPOError("--import-run and --predictions go together")
    if args.import_run:
        print(experiments.import_run(args.import_run, args.predictions))
        return
    chosen = [f"table {n}" for n in (grid.TABLES if args.all else sorted(set(args.table)))]
    chosen += [f"figure {n}" for n in (grid.FIGURES if args.all else sorted(set(args.figure)))]
    if args.list:
        _list(experiments, chosen)
        return
    if not chosen and not args.only:
        raise TKPOError("nothing chosen: give --table N, --figure N, --all or --list (see --help)")
    if args.only and not args.run:
        raise TKPOError("--only names runs to make: give --run with it")
    if args.jobs < 1:
        raise TKPOError(f"--jobs must be at least 1, not {args.jobs}")
    if args.run:
        _run(experiments, chosen, args.only, work / preset.name, args.device, args.jobs)
    for what in chosen:
        _make(what, experiments, output, args.format)
    if args.all:
        experiments.write_outlines(output["tables"] / "outlines.parquet")
        if output["tables"] == PAPER / "tables":
            pages.write(experiments)


def _make(what: str, experiments: Experiments, output: dict[str, Path], form: str) -> None:
    """Write one table or figure, and print the table or the paths of the figure."""
    kind, number = what.split()
    if kind == "figure":
        from paper.reproduction import figures

        print(*figures.write(int(number), experiments, output["figures"]), sep="\n")
        return
    table = tables.TABLES[int(number)](experiments)
    rendering.write(table, output["tables"])
    if form == "terminal":
        rendering.show(table)
    else:
        print(rendering.FORMATS[form](table))


def _places(results: Path | None, preset: str) -> tuple[Path, dict[str, Path], Path]:
    """Folders of (results, tables and figures, training runs). Only PRESET writes the project's own figures."""
    root, work = PAPER.parent, PAPER.parent / "runs" / "paper"
    if results is None and preset == "tiny":
        results = work
    if results:
        return results, {kind: results / preset / kind for kind in ("tables", "figures")}, results / "runs"
    results = PAPER / "results"
    if preset == PRESET:
        return results, {"tables": PAPER / "tables", "figures": root / "figures"}, work
    return results, {kind: results / preset / kind for kind in ("tables", "figures")}, work


def _wanted(experiments: Experiments, chosen: list[str]) -> list[Run]:
    """The runs of every grid that serves one of the chosen tables and figures, in the grids' order."""
    found = {grid.name: runs for what in chosen for grid, runs in experiments.serving(what)}
    return [run for name in experiments.grids for run in found.get(name, [])]


def _run(
    experiments: Experiments, chosen: list[str], only: list[str] | None, work: Path, device: str | None, jobs: int
) -> None:
    from paper.reproduction.runner import do_runs

    if only:
        known = {run.name: run for run in _wanted(experiments, list(grid.SHOWN))}
        unknown = [name for name in only if name not in known]
        if unknown:
            raise TKPOError(f"no run {unknown[0]!r}; --list names them")
        do_runs(experiments.store, [known[name] for name in only], work, device, jobs)
        return
    done, failed = [], []
    while wanted := [run for run in _wanted(experiments, chosen) if run not in done]:  # the tuned ones are known last
        try:
            do_runs(experiments.store, wanted, work, device, jobs)
        except TKPOError as error:
            failed.append(str(error))
        done += wanted
    if failed:
        raise TKPOError("\n".join(failed))


def _list(experiments: Experiments, chosen: list[str]) -> None:
    from paper.reproduction.figures import FIGURES

    titles = {f"table {n}": (make.__doc__ or "").strip() for n, make in tables.TABLES.items()}
    titles |= {f"figure {n}": make.__doc__.strip() for n, make in FIGURES.items()}
    for what, title in titles.items():
        if chosen and what not in chosen:
            continue
        print(f"{what}: {title}")
        for served, runs in experiments.serving(what):
            missing = [run for run in runs if not experiments.store.get(run)]
            if served.tuned_by and not runs:
                print(f"  {served.name}: waits for {served.tuned_by['grid']}")
                continue
            print(f"  {served.name}: {len(runs) - len(missing)} of {len(runs)} runs stored")
            for run in missing:
                print(f"    missing: {run.name}")


if __name__ == "__main__":
    sys.exit(main())
