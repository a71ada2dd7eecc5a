"""Read a run folder: the counts of each file, the metrics, the training steps, the settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from srlm_cli import records
from srlm_cli.errors import DataError, OptionError
from srlm_cli.records import PROVENANCE, Record, is_number
from srlm_cli.report.parts import joined_counts, joined_steps, joined_training, part_folders
from srlm_cli.stages.pair_choice import SHUFFLED
from srlm_cli.streams.reader import Reader, read_all
from srlm_cli.train.workdir import METRICS

if TYPE_CHECKING:
    from srlm_cli.evaluate.health import Judged

STAGES = ("prompts", "responses", "judged", "pairs", "meta", "judge-pairs")
LESSONS = {"judged", "pairs", "judge-pairs"}  # what trainings of the loop read
PART_FIELDS = ("replies", "category", "criterion", "rule", "probe", "bin")
META = ".meta.json"
RATING = "bradley_terry"


@dataclass
class Metrics:
    """Metric rows: totals over all rows by name, and metrics of parts by the field that names the part."""

    totals: dict[str, Record] = field(default_factory=dict)
    parts: dict[str, list[Record]] = field(default_factory=dict)

    def row(self, name: str) -> Record | None:
        """Return a metric that has a value, or None."""
        row = self.totals.get(name)
        return row if row and row.get("value") is not None else None

    def decided(self, name: str) -> Record | None:
        """Return a metric that has a value and an interval, or None."""
        row = self.row(name)
        return row if row and row.get("ci_low") is not None else None

    def value(self, name: str) -> float | None:
        """Return the value of a metric, or None."""
        row = self.row(name)
        return row and row["value"]


@dataclass
class Game:
    """The matches of one model against another, with the model names of the rows."""

    model: str | None
    baseline: str | None
    metrics: Metrics


@dataclass
class Round:
    """One round Mt: the counts of its stages, its training, its pairs and its metrics.

    `training` is the provenance of the model Mt and `steps` its logged training steps. `files` has the provenance of
    each file. `health` are metrics of the judge, `reward` those of the judge against people, `probes` those of changed
    replies, `rules` those of the rules that the model's replies to held-out prompts keep. The first of `games` is Mt
    against the previous model. `ratings` are the metric rows with the rating of each model.
    """

    name: str
    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    health: Metrics = field(default_factory=Metrics)
    reward: Metrics = field(default_factory=Metrics)
    rules: Metrics = field(default_factory=Metrics)
    probes: Metrics = field(default_factory=Metrics)
    games: list[Game] = field(default_factory=list)
    ratings: list[Record] = field(default_factory=list)

    @property
    def matches(self) -> Metrics:
        """The metrics of Mt against the previous model, empty if they were not compared."""
        return self.games[0].metrics if self.games else Metrics()


@dataclass
class Run:
    """A run folder: its rounds in order, the settings of its commands, and its unfinished files."""

    name: str
    rounds: list[Round]
    settings: dict[str, dict[str, Any]]
    unfinished: list[str]

    def model(self, path: str | None) -> str:
        """Return the short name of a model: Mt for models of this run, M0 for the model from which M1 was trained."""
        if not path or path == self.base:
            return "M0" if path else "?"
        parts = Path(path).parts
        if len(parts) > 1 and parts[-1] == "model" and any(found.name == parts[-2] for found in self.rounds):
            return parts[-2]
        return Path(path).name

    def reply_length(self, found: Round) -> Record | None:
        """Return the mean length of a model's replies to held-out prompts, from matches of any round, or by rules."""
        played = [game for one in [found, *self.rounds] for game in one.games]
        sides = [(game.model, "length", game) for game in played]
        sides += [(game.baseline, "baseline_length", game) for game in played]
        rows = [game.metrics.row(metric) for name, metric, game in sides if self.model(name) == found.name]
        return next((row for row in rows if row), found.rules.row("length"))

    def length_change(self, found: Round, since: Round | None) -> float | None:
        """Return the mean length of a model's replies over that of an earlier model, None if one is not known."""
        rows = [since and self.reply_length(since), self.reply_length(found)]
        return rows[1]["value"] / rows[0]["value"] if all(rows) and rows[0]["value"] else None

    def before(self, found: Round) -> Round | None:
        """Return the round before, None for the first."""
        at = self.rounds.index(found)
        return self.rounds[at - 1] if at else None

    @property
    def base(self) -> str | None:
        """The model that M1 was trained from."""
        return next((r.training.get("from", {}).get("model") for r in self.rounds if r.training), None)


def collect(folder: Path, seed: int = 0) -> Run:
    """Return the contents of a run folder; raise OptionError if it is not a run, DataError on a bad row.

    Any file can be missing, so an unfinished run can be shown. EFT building is the first round.
    """
    found = [p for p in folder.glob("M*") if p.is_dir() and p.name[1:].isdigit()]
    if (folder / f"eft.jsonl{META}").exists() and folder / "M0" not in found:
        found.append(folder / "M0")
    if not found:
        raise OptionError(
            f"{folder} is not a run folder: it has no M0, M1, ...", "`make iterate` creates one in runs/NAME"
        )
    folders = sorted(found, key=lambda path: int(path.name[1:]))
    rounds = [round_of(path) for path in folders]
    if rounds[0].name == "M0":
        rounds[0].files |= files_of(folder)
        rounds[0].stages = counts_of(rounds[0].files, ("eft",)) | rounds[0].stages
    settings = settings_of(folder)
    parts = {found.name: part_folders(found.folder, settings) for found in rounds}
    join_parts(rounds, parts)
    leave_out_unused(rounds)
    measure_health(rounds, seed)
    return Run(folder.resolve().name, rounds, settings, unfinished(folder, [*folders, *chain(*parts.values())]))


def join_parts(rounds: list[Round], parts: dict[str, list[Path]]) -> None:
    """Add what the parts of each round did to the round, and their trainings to that of the model that ends it."""
    for found, after in zip(rounds, [*rounds[1:], None], strict=True):
        if folders := parts[found.name]:
            files = {folder.name: files_of(folder) for folder in folders}
            counts = joined_counts((counts_of(some, STAGES) for some in files.values()), STAGES)
            found.stages = {stage: (found.stages | counts)[stage] for stage in STAGES if stage in found.stages | counts}
            found.files |= {f"{part}/{name}": meta for part, some in files.items() for name, meta in some.items()}
        if folders and after and after.training:
            models = [folder / "model" for folder in folders[:-1]]
            after.training = joined_training([*(read_json(model / PROVENANCE) for model in models), after.training])
            after.steps = joined_steps([*(steps_of(model / METRICS) for model in models), after.steps])


def leave_out_unused(rounds: list[Round]) -> None:
    """Leave out pairs that the training after a round did not read: they are left from other settings.

    A training that read a file of another name can have read them in it, so nothing is left out.
    """
    for found, after in pairwise(rounds):
        read = {Path(path).stem for path in after.training.get("inputs", {})}
        if read and read <= LESSONS:
            unused = (LESSONS - read - {"judged"}) | (set() if "judge-pairs" in read else {"meta"})
            found.stages = {stage: counts for stage, counts in found.stages.items() if stage not in unused}
            found.pairs = {} if "pairs" in unused else found.pairs


def round_of(folder: Path) -> Round:
    """Return the contents of one folder Mt."""
    files = files_of(folder)
    compared = rows_of(folder / "eval-head-to-head.jsonl", records.metric_record)
    return Round(
        folder.name,
        folder,
        stages=counts_of(files, STAGES),
        training=read_json(folder / "model" / PROVENANCE),
        steps=steps_of(folder / "model" / METRICS),
        pairs=pairs(folder / "pairs.jsonl"),
        files=files,
        health=metrics(rows_of(folder / "eval-health.jsonl", records.metric_record)),
        reward=metrics(rows_of(folder / "eval-reward.jsonl", records.metric_record)),
        rules=metrics(rows_of(folder / "eval-rules.jsonl", records.metric_record)),
        probes=metrics(rows_of(folder / "eval-probe.jsonl", records.metric_record)),
        games=games(row for row in compared if row["metric"] != RATING),
        ratings=[row for row in compared if row["metric"] == RATING],
    )


def steps_of(path: Path) -> list[Record]:
    """Return the logged steps of a training; unlike rows they can contain NaN, for instance as gradient norm."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    try:
        steps = [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    return [step for step in steps if isinstance(step, dict)]


def metrics(rows: Iterable[Record]) -> Metrics:
    """Return metric rows sorted into totals and parts, so that a part is never used as the total."""
    made = Metrics()
    for row in rows:
        if row["metric"] == "share_of_score":
            made.parts.setdefault("score", []).append(row)
        elif part := next((name for name in PART_FIELDS if name in row), None):
            made.parts.setdefault(part, []).append(row)
        else:
            made.totals[row["metric"]] = row
    return made


def games(rows: Iterable[Record]) -> list[Game]:
    """Return the metric rows of matches, grouped by pair of models, in the order of the file."""
    played: dict[tuple[str | None, str | None], list[Record]] = {}
    for row in rows:
        played.setdefault((row.get("model"), row.get("baseline")), []).append(row)
    return [Game(model, baseline, metrics(some)) for (model, baseline), some in played.items()]


def measure_health(rounds: list[Round], seed: int) -> None:
    """Compute the health metrics of each round whose run has not written them."""
    from srlm_cli.evaluate.health import health_metrics

    for before, found in zip([None, *rounds], rounds, strict=False):
        if not found.health.totals and (judged := judged_numbers(found)):
            accuracies = [one.reward.row("pairwise_accuracy") if one else None for one in (found, before)]
            earlier = judged_numbers(before) if before else None
            found.health = metrics(health_metrics(judged, earlier, *accuracies, seed))


def judged_numbers(found: Round) -> Judged | None:
    """Return the numbers of a round's judged file, None if there is none."""
    from srlm_cli.evaluate.health import numbers_of

    rows = rows_of(found.folder / "judged.jsonl", records.judged_record)
    return numbers_of(rows) if rows else None


def pairs(path: Path) -> dict[str, Any]:
    """Return the mean lengths, in characters, and the mean score gap of preference pairs; {} without pairs."""
    rows = rows_of(path, records.pair_record)
    if not rows:
        return {}
    found: dict[str, Any] = {side: fmean(len(text_of(row[side])) for row in rows) for side in ("chosen", "rejected")}
    scores = [(row.get("score_chosen"), row.get("score_rejected")) for row in rows]
    gaps = [chosen - rejected for chosen, rejected in scores if is_number(chosen) and is_number(rejected)]
    shuffled = sum(SHUFFLED in row for row in rows)
    return {**found, "count": len(rows), "gap": fmean(gaps) if gaps else None, "shuffled": shuffled}


def text_of(side: records.Prompt) -> str:
    """Return a chosen or rejected reply, a text or messages, as text."""
    return side if isinstance(side, str) else side[-1]["content"]


# --- files -----------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the provenance of each finished file of a folder, by file name."""
    found = {path.name.removesuffix(META): path for path in sorted(folder.glob(f"*{META}"))}
    return {name: read_json(path) for name, path in found.items() if not name.endswith(".part")}


def counts_of(files: dict[str, dict[str, Any]], stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the counts of the files that the stages wrote."""
    found = {stage: files.get(f"{stage}.jsonl", {}).get("counts") for stage in stages}
    return {stage: counts for stage, counts in found.items() if counts}


def settings_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the options of each command as Make compares them, if the run has saved them."""
    found = {path.stem: read_json(path) for path in sorted((folder / ".settings").glob("*.json"))}
    found.pop("report", None)  # report only reads
    return {values.pop("command", name): values for name, values in found.items()}


def unfinished(run: Path, folders: list[Path]) -> list[str]:
    """Return one line per file and model that was started and is not finished."""
    lines = []
    for part in sorted(path for folder in {run, *folders} for path in folder.glob("*.part")):
        name = part.relative_to(run).as_posix().removesuffix(".part")
        counts = read_json(part.with_name(f"{part.name}{META}")).get("checkpoint", {})
        rows = f", {counts['kept']} rows so far" if "kept" in counts else ""
        if part.name in ("eval-health.jsonl.part", "eval-rules.jsonl.part"):
            lines.append(f"{name} was held back: a guard stopped the loop here; make says which limit was passed.")
        else:
            held = "" if part.is_dir() else ", or held back over a limit"
            lines.append(f"{name} is not finished{rows}: being made, or interrupted{held}.")
    return lines


def rows_of(path: Path, check: Callable[[Record], Record] = dict) -> list[Record]:
    """Return the rows of a file, none if it does not exist yet."""
    return read_all(str(path), check) if path.exists() else []


def picked_rows(path: Path, ids: set[str], check: Callable[[Record], Record]) -> dict[str, Record]:
    """Return the rows of a file with these ids, by id; the file is read line by line."""
    if not ids or not path.exists():
        return {}
    reader = Reader([str(path)], check)
    found = {row["id"]: row for row in reader if row["id"] in ids}
    if reader.error:
        raise reader.error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, {} if there is no file; raise DataError if it is not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object")
    return found
