"""Presets and grids of runs, read from YAML, and the configuration of each run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import yaml

from paper.reproduction.names import CONTENT_FREE, SCORES
from tkpo.data import load_records
from tkpo.data.prompts import INSTRUCTION_FIRST
from tkpo.errors import TKPOError
from tkpo.methods import CONTINUED, METHODS
from tkpo.run_config import RunConfig

FOLDER = Path(__file__).parents[1] / "experiments"
PRESET = "qwen2.5-coder-0.5b"  # the one whose tables and figures the project shows
QUESTIONS = "questions.yaml"
BASE = "base"  # the model as it is, zero-shot
# Fields of a RunConfig that say how a run is done, not what it is.
HOW = ("output", "sft_adapter", "device", "data_dir", "axes_file", "micro_batch_size", "gradient_checkpointing")
HOW += ("deepspeed", "save_steps", "eval_steps", "eval_samples", "share_prefix", "attn_implementation")
HOW += ("report_to", "run_name", "push_to_hub", "hub_model_id")
DECODING = {"style_strength": 0.0}  # settings of a variant that say how outlines are written, with their defaults
TABLES, FIGURES = range(1, 8), range(1, 5)
SHOWN = (*(f"table {n}" for n in TABLES), *(f"figure {n}" for n in FIGURES))  # what a grid can serve


@dataclass(frozen=True)
class Preset:
    """A base model with what its runs have in common: one entry of presets.yaml."""

    name: str
    model: str
    datasets: dict[str, dict]
    train: dict = field(default_factory=dict)
    methods: dict[str, dict] = field(default_factory=dict)
    seeds: list[int] | None = None


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation: a method on a data set, with one seed.

    settings: what differs from the preset, as sorted (key, value) pairs. share: of the preset's samples or articles.
    from_base: of a method that by default continues an SFT adapter, whether it starts from the base instead.
    """

    dataset: str
    method: str
    seed: int
    settings: tuple = ()
    share: float = 1.0
    split: str = "test"
    from_base: bool = False

    @property
    def name(self) -> str:
        parts = [self.method, *(["one-stage"] if self.from_base else []), *([self.variant] if self.settings else [])]
        if self.share != 1:
            parts.append(f"share={self.share:g}")
        if self.split != "test":
            parts.append(self.split)
        return f"{self.dataset.replace(',', '+')}/{'-'.join(parts)}-seed{self.seed}"

    @property
    def variant(self) -> str:
        """Its settings as text."""
        return "-".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.settings)

    @property
    def sft(self) -> Run | None:
        """The SFT run that this one continues, if it does."""
        if self.method not in CONTINUED or self.from_base:
            return None
        return Run(self.dataset, "sft", self.seed, share=self.share)

    @property
    def trained(self) -> Run | None:
        """The run whose adapter this one only writes with, in another way; None if it trains its own."""
        training = tuple((key, value) for key, value in self.settings if key not in DECODING)
        if self.method == BASE or training == self.settings:
            return None
        return replace(self, settings=training, split="test")

    @property
    def needs(self) -> Run | None:
        """The run whose adapter must be there first."""
        return self.trained or self.sft


@dataclass(frozen=True)
class Grid:
    """One file of experiments: every method (and variant of it) × data set × seed.

    label: sets its runs apart from those of the same method in other grids, in a row of their own.
    pilot: whether tables mark its results as those of the pilot.
    """

    name: str
    title: str
    serves: tuple[str, ...]
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    share: float = 1.0
    split: str = "test"
    variants: dict[str, list[dict]] = field(default_factory=dict)
    tuned_by: dict | None = None
    label: str = ""
    from_base: bool = False
    pilot: bool = False

    def runs(self, preset: Preset, seeds: list[int] | None = None) -> list[Run]:
        """Its runs, in order. `seeds` (or the preset's) takes the place of its own; zero-shot has one run."""
        if self.tuned_by:
            raise TKPOError(f"the runs of grid {self.name} depend on the results of {self.tuned_by['grid']}")
        made = []
        for seed in seeds or preset.seeds or self.seeds:
            for dataset in self.datasets:
                for method in self.methods:
                    for variant in self.variants.get(method, [{}]):
                        run = self.run(preset, dataset, method, seed, variant)
                        if method != BASE or seed == (seeds or preset.seeds or self.seeds)[0]:
                            made.append(run)
        return made

    def run(self, preset: Preset, dataset: str, method: str, seed: int, variant: dict) -> Run:
        base = {**asdict(RunConfig(method="sft")), **_common(preset, dataset, method)}
        settings = {}
        for key, value in variant.items():
            if times := re.fullmatch(r"x([0-9.]+)", str(value)):
                value = float(times[1]) * float(base[key])
            settings[key] = float(f"{value:.6g}") if isinstance(value, float) else value
        from_base = self.from_base and method in CONTINUED
        seed = 0 if method == BASE else seed
        return Run(dataset, method, seed, tuple(sorted(settings.items())), self.share, self.split, from_base)


def load_preset(name: str, folder: Path = FOLDER) -> Preset:
    """The entry `name` of presets.yaml; TKPOError lists the entries there are."""
    table = _read(folder / "presets.yaml")
    if name not in table:
        raise TKPOError(f"no preset {name!r} in {folder / 'presets.yaml'}; there are: {', '.join(table)}")
    try:
        return Preset(name, **table[name])
    except TypeError as error:
        raise TKPOError(f"{folder / 'presets.yaml'}, {name}: {error}") from error


def preset_names(folder: Path = FOLDER) -> list[str]:
    return list(_read(folder / "presets.yaml"))


def load_grids(folder: Path = FOLDER) -> dict[str, Grid]:
    """Every grid by its name, in the order in which their runs are to be done: that of the file names."""
    grids = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name in ("presets.yaml", QUESTIONS):
            continue
        table = _read(path)
        try:
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
            grid = Grid(name=path.stem, **values)
        except TypeError as error:
            raise TKPOError(f"{path}: {error}") from error
        unknown = [m for m in grid.methods if m not in (BASE, *METHODS)]
        if unknown:
            raise TKPOError(f"{path}: no method {unknown[0]!r}; there are: {', '.join((BASE, *METHODS))}")
        if not 0 < grid.share <= 1:
            raise TKPOError(f"{path}: share must be above 0 and at most 1, not {grid.share}")
        if grid.tuned_by and grid.tuned_by.get("grid") not in grids:
            raise TKPOError(f"{path}: tuned_by names no grid that comes before it: {grid.tuned_by.get('grid')!r}")
        _check_served(path, grid)
        grids[path.stem] = grid
    if not grids:
        raise TKPOError(f"no experiments (*.yaml) in {folder}")
    return grids


@dataclass(frozen=True)
class Question:
    """A comparison of two rows by one score, written down before the runs that answer it.

    ours, theirs: (method, label). why: what the answer is needed for.
    """

    name: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    score: str
    why: str = ""


def load_questions(grids: dict[str, Grid], folder: Path = FOLDER) -> list[Question]:
    """The questions of questions.yaml, if there is one; TKPOError for one that the main comparison has no rows for."""
    path = folder / QUESTIONS
    if not path.exists():
        return []
    rows = {(m, grid.label) for grid in grids.values() if "table 2" in grid.serves for m in grid.methods}
    questions = []
    for name, entry in _read(path).items():
        try:
            parts = [str(entry[side]).partition(", ") for side in ("ours", "theirs")]
            sides = [(method, label) for method, _, label in parts]
            question = Question(name, *sides, entry["score"], entry.get("why", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise TKPOError(f"{path}, {name}: expected ours, theirs and score ({error!r})") from error
        known = rows | {(method, "") for method in CONTENT_FREE}
        if unknown := [side for side in sides if side not in known]:
            raise TKPOError(f"{path}, {name}: no experiment for table 2 has the row {', '.join(unknown[0])!r}")
        if question.score not in SCORES:
            raise TKPOError(f"{path}, {name}: no score {question.score!r}; there are: {', '.join(SCORES)}")
        questions.append(question)
    return questions


def _check_served(path: Path, grid: Grid) -> None:
    """TKPOError for a grid that no table or figure shows, or that names one that does not exist."""
    if not grid.serves:
        raise TKPOError(f"{path}: serves is empty: no table or figure would show these runs")
    if unknown := [what for what in grid.serves if what not in SHOWN]:
        raise TKPOError(f"{path}: serves {unknown[0]!r}, which does not exist; there are: {', '.join(SHOWN)}")


def _read(path: Path) -> dict:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TKPOError(f"cannot read experiments {path}: {error}") from error
    if not isinstance(table, dict):
        raise TKPOError(f"{path}: expected keys and values")
    return table


def run_config(run: Run, preset: Preset, **how) -> RunConfig | None:
    """The training configuration of a run; None for zero-shot. how: fields such as output and sft_adapter."""
    if run.method == BASE:
        return None
    values = _common(preset, run.dataset, run.method)
    values["max_samples"] = sample_count(run, preset)
    if values.get("max_articles"):
        values["max_articles"] = max(1, round(run.share * values["max_articles"]))
    values |= {key: value for key, value in run.settings if key not in DECODING}
    values |= {"method": run.method, "dataset": run.dataset, "model": preset.model, "seed": run.seed}
    if run.sft and values.get("finetuning", "lora") == "lora":
        values["sft_adapter"] = str(run.sft.name)
    return RunConfig.load(**{**values, **how})


def _common(preset: Preset, dataset: str, method: str) -> dict:
    """What the runs of a method on a data set have in common: the preset's, the data set's, then the method's."""
    entry = preset.datasets.get(dataset, {})
    own = entry.get("methods", {}).get(method, {})
    return {**preset.train, **entry.get("train", {}), **preset.methods.get(method, {}), **own}


def sample_count(run: Run, preset: Preset) -> int | None:
    """How many samples the run trains on; None is all of them."""
    entry = _dataset(run, preset)
    count = entry.get("max_samples")
    if run.share == 1 or entry.get("train", {}).get("max_articles"):
        return count
    if count is None:
        count = _count(run.dataset, preset.train.get("lang"))
    return max(1, round(run.share * count))


@cache
def _count(dataset: str, lang: str | None) -> int:
    return len(load_records(dataset, "train", lang))


def evaluation(run: Run, preset: Preset) -> dict:
    """What decides the predictions of a run, beside its training."""
    entry = _dataset(run, preset)
    limits = {key: entry[key] for key in ("limit", "max_new_tokens")}
    if run.split == "validation":
        limits["limit"] = entry.get("validation_limit", entry["limit"])
    return {
        "model": preset.model,
        "dataset": run.dataset,
        "split": run.split,
        "lang": preset.train.get("lang"),
        **limits,
        **DECODING,
        **{key: value for key, value in run.settings if key in DECODING},
    }


def differences(run: Run, preset: Preset, config: dict | None, settings: dict) -> list[str]:
    """How a finished run differs from what the experiments say, one sentence per difference.

    config: of its training (None: zero-shot). settings: of its evaluation.
    """
    wanted, made = what_it_is(run_config(run, preset)) or {}, what_it_is(config) or {}
    pairs = [(key, made[key], value) for key, value in wanted.items() if key in made]
    pairs += [(key, settings.get(key, DECODING.get(key)), value) for key, value in evaluation(run, preset).items()]
    return [f"it was made with {key} {old!r}, the experiments say {new!r}" for key, old, new in pairs if old != new]


def run_order(run: Run, preset: Preset) -> str:
    """The order of a run's prompts."""
    values = {**_common(preset, run.dataset, run.method), **dict(run.settings)}
    return values.get("prompt_order", INSTRUCTION_FIRST)


def _dataset(run: Run, preset: Preset) -> dict:
    if run.dataset not in preset.datasets:
        raise TKPOError(f"preset {preset.name} says nothing about data set {run.dataset}: add it to presets.yaml")
    return preset.datasets[run.dataset]


def what_it_is(config: RunConfig | dict | None) -> dict | None:
    """The fields of a configuration that decide the trained weights."""
    if config is None:
        return None
    values = config if isinstance(config, dict) else asdict(config)
    return {key: value for key, value in values.items() if key not in HOW}
