"""Regenerate the paper's tables and figures from stored results, and make the runs that they lack.

python paper/reproduce.py --all                    every table and figure, and the pages that tell of them
python paper/reproduce.py --table 2 --format md    one table, printed and written
python paper/reproduce.py --list                   what there is, and which runs each still lacks
python paper/reproduce.py --run --table 2          make those runs first; a run that was cut off goes on
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from reproduction import grid, readme, store, tables
from reproduction.grid import PRESET, Run
from reproduction.tables import Results

from tkpo.errors import TKPOError

PAPER = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 (bad input or a failed run), 130 (interrupted: what is done is stored)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        _reproduce(_parser().parse_args(argv))
    except TKPOError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--table", type=int, nargs="+", choices=tables.TABLES, default=[], metavar="N", help="1 to 5")
    what.add_argument("--figure", type=int, nargs="+", choices=range(1, 5), default=[], metavar="N", help="1 to 4")
    what.add_argument("--all", action="store_true", help="every table and figure")
    what.add_argument("--list", action="store_true", help="list tables, figures and the runs that each lacks")
    what.add_argument("--run", action="store_true", help="first make the runs that the chosen tables and figures lack")
    what.add_argument("--only", nargs="+", metavar="RUN", help="with --run: these runs alone, named as --list does")
    what.add_argument(
        "--import-run", metavar="FOLDER", help="store a run of `tkpo train` (or base), with --predictions"
    )
    what.add_argument("--predictions", metavar="FILE", help="what `tkpo evaluate` wrote for the imported run")
    how = parser.add_argument_group("how")
    how.add_argument("--preset", default=PRESET, help=f"entry of experiments/presets.yaml; default {PRESET}")
    how.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the experiments' own")
    how.add_argument("--device", help="cpu or cuda, for --run; default: what there is")
    how.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="with --run: so many at a time; no times are told of such runs"
    )
    how.add_argument("--format", choices=("terminal", *tables.FORMATS), default="terminal", help="of what is printed")
    how.add_argument(
        "--results", metavar="DIR", type=Path, help="folder for results, with tables, figures and training runs beside"
    )
    how.add_argument("--output", metavar="DIR", type=Path, help="folder for tables/ and figures/ in place of the usual")
    how.add_argument("--experiments", metavar="DIR", type=Path, default=grid.FOLDER, help="default paper/experiments")
    return parser


def _reproduce(args) -> None:
    preset = grid.load_preset(args.preset, args.experiments)
    folder, output, work = _places(args.results, preset.name)
    output = {kind: args.output / kind if args.output else path for kind, path in output.items()}
    results = Results(store.Store(folder, preset), grid.load_grids(args.experiments), args.seeds)
    if bool(args.import_run) != bool(args.predictions):
        raise TKPOError("--import-run and --predictions go together")
    if args.import_run:
        print(store.import_run(results.store, results.grids, args.import_run, args.predictions))
        return
    chosen = [f"table {n}" for n in (tables.TABLES if args.all else sorted(set(args.table)))]
    chosen += [f"figure {n}" for n in (range(1, 5) if args.all else sorted(set(args.figure)))]
    if args.list:
        _list(results, chosen)
        return
    if not chosen and not args.only:
        raise TKPOError("nothing chosen: give --table N, --figure N, --all or --list (see --help)")
    if args.only and not args.run:
        raise TKPOError("--only names runs to make: give --run with it")
    if args.jobs < 1:
        raise TKPOError(f"--jobs must be at least 1, not {args.jobs}")
    if args.run:
        _run(results, chosen, args.only, work / preset.name, args.device, args.jobs)
    for what in chosen:
        kind, number = what.split()
        if kind == "table":
            table = tables.TABLES[int(number)](results)
            tables.write(table, output["tables"])
            if args.format == "terminal":
                tables.show(table)
            else:
                print(tables.FORMATS[args.format](table))
        else:
            from reproduction import figures

            for path in figures.write(int(number), results, output["figures"]):
                print(path)
    if args.all and output["tables"] == PAPER / "tables":
        readme.write(results)


def _places(results: Path | None, preset: str) -> tuple[Path, dict[str, Path], Path]:
    """(results, folders of tables and figures, training runs). Only PRESET's tables and figures are the project's."""
    root, work = PAPER.parent, PAPER.parent / "runs" / "paper"
    if results is None and preset == "tiny":
        results = work
    if results:
        return results, {kind: results / preset / kind for kind in ("tables", "figures")}, results / "runs"
    results = PAPER / "results"
    if preset == PRESET:
        return results, {"tables": PAPER / "tables", "figures": root / "figures"}, work
    return results, {kind: results / preset / kind for kind in ("tables", "figures")}, work


def _wanted(results: Results, chosen: list[str]) -> list[Run]:
    """The runs of every grid that serves one of the chosen tables and figures, in the grids' order."""
    found = {}
    for what in chosen:
        for served, runs in results.serving(what):
            found[served.name] = runs
    return [run for name in results.grids for run in found.get(name, [])]


def _run(
    results: Results, chosen: list[str], only: list[str] | None, work: Path, device: str | None, jobs: int
) -> None:
    from reproduction.runner import do_runs

    if only:
        known = {run.name: run for run in _wanted(results, [w for g in results.grids.values() for w in g.serves])}
        unknown = [name for name in only if name not in known]
        if unknown:
            raise TKPOError(f"no run {unknown[0]!r}; --list names them")
        do_runs(results.store, [known[name] for name in only], work, device, jobs)
        return
    done, failed = [], []
    while wanted := [run for run in _wanted(results, chosen) if run not in done]:  # the tuned ones are known last
        try:
            do_runs(results.store, wanted, work, device, jobs)
        except TKPOError as error:
            failed.append(str(error))
        done += wanted
    if failed:
        raise TKPOError("\n".join(failed))


def _list(results: Results, chosen: list[str]) -> None:
    titles = {f"table {n}": (make.__doc__ or "").strip() for n, make in tables.TABLES.items()}
    from reproduction.figures import FIGURES

    titles |= {f"figure {n}": make.__doc__.strip() for n, make in FIGURES.items()}
    for what, title in titles.items():
        if chosen and what not in chosen:
            continue
        print(f"{what}: {title}")
        for served, runs in results.serving(what):
            missing = [run for run in runs if not results.store.get(run)]
            if served.tuned_by and not runs:
                print(f"  {served.name}: waits for {served.tuned_by['grid']}")
                continue
            print(f"  {served.name}: {len(runs) - len(missing)} of {len(runs)} runs stored")
            for run in missing:
                print(f"    missing: {run.name}")


if __name__ == "__main__":
    sys.exit(main())
