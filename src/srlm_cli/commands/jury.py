"""srlm jury."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from typer import Option

from srlm_cli import templates
from srlm_cli.commands.eval.reward import human_values, reply_key
from srlm_cli.errors import DataError, OptionError
from srlm_cli.evaluate.reward import judge_name
from srlm_cli.options.common import StreamOptions, identity, new_app
from srlm_cli.options.groups import grouped
from srlm_cli.records import Record, is_number
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.outputs import refuse_own_input, same_file
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages import Outcome
from srlm_cli.stages import jury as stage
from srlm_cli.stages.head_to_head import names_of
from srlm_cli.streams import spill
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader, file_hash, shown
from srlm_cli.streams.side_by_side import SideBySide
from srlm_cli.streams.writer import encode_row
from srlm_cli.templates.groups import load_group

app = new_app()


@dataclass(frozen=True)
class JuryStreams(StreamOptions):
    """Several files in, one out."""

    in_: Annotated[
        list[str] | None,
        Option(
            "--in", "-i", metavar="FILE", show_default="-",
            help="Judged rows of one juror, plain or .gz; - is stdin (repeatable).",
        ),
    ] = None  # fmt: skip


@app.command()
@grouped
def jury(
    stream: JuryStreams,
    weights: Annotated[
        str,
        Option(
            "--weights",
            metavar="equal|accuracy|FILE",
            help="How much each juror counts; accuracy: by agreement with people; FILE: JSON {juror: number}.",
        ),
    ] = "equal",
    ranked: Annotated[
        str | None,
        Option(
            "--ranked",
            metavar="FILE",
            help="With --weights accuracy: ranked rows, when the judged rows do not have the human ranking.",
        ),
    ] = None,
    unsorted: Annotated[
        bool, Option("--unsorted", help="Input not grouped by prompt: group the rows on disk first.")
    ] = False,
) -> None:
    """Join the judged rows of several judges into one judged file.

    \b
    Examples:
      srlm jury --in judged-a.jsonl --in judged-b.jsonl --in judged-c.jsonl --out jury.jsonl
      srlm jury --in <(srlm judge -i r.jsonl -m A) --in <(srlm judge -i r.jsonl -m B) | srlm make-pairs > pairs.jsonl
      srlm jury --in eval-a.jsonl --in eval-b.jsonl --weights accuracy --ranked ranked_eval.jsonl | srlm eval reward

    Each file is a juror. A reply is found by its id, in files of any order. `score` is the weighted mean of
    the jurors' scores, `scores` has one per juror, `score_from` is null for a juror without a score and
    `missing` for one whose file lacks the reply. A juror without a score does not count; without any, the
    score is null. All jurors must use the same scale: scores of --implicit, --engine reward and --by pairwise are
    not averaged with those of another kind.

    Files with the same prompts in the same order are joined one prompt at a time. From the first difference
    on, the rest is joined on disk, in the folder for temporary files (TMPDIR). Memory stays the same
    however long the files are. --limit N reads N rows of each file.

    Prints Krippendorff's alpha (interval) of all jurors; for each two of them Cohen's kappa with quadratic
    weights, and how often they give the same score and order two replies alike; for each juror what is
    missing. With `--weights accuracy` the weight is the log odds of the share of reply pairs that the juror
    orders as people do (0 for a juror at or below chance). docs/judge.md has the formulas.
    """
    paths = stream.in_ or ["-"]
    refuse_clashes(paths, ranked, weights)
    refuse_own_input(stream.out, [*paths, *filter(None, [ranked])])
    given = None if weights in ("equal", "accuracy") else weights_of_file(weights)
    beside = [*paths, *filter(None, [ranked, weights if given else None])]
    first = open_reader(stream, stage.juror_record, paths[:1], traced=False, beside=beside)
    reading = {"on_error": stream.on_error, "limit": stream.limit, "rejects": first.rejects, "traced": False}
    readers = [first, *(Reader([path], stage.juror_record, **reading) for path in paths[1:])]
    jurors = jurors_of(readers, given, weights)
    bench = stage.Bench(len(jurors))
    weigh = Weighing(jurors, human_values(ranked) if ranked else None) if weights == "accuracy" else None

    def make(rows: SideBySide, _: Any) -> Iterator[Outcome]:
        streams = [rows.rows(number) for number in range(len(jurors))]
        joining = {"unsorted": unsorted, "is_new": spill.Seen().add, "group_by_key": spill.group_by_key}
        joined = stage.jury(streams, jurors, bench, **joining)
        yield from weigh.outcomes(joined, rows) if weigh else as_lines(joined, stage.judge_of(jurors))
        if len(jurors) > 1 and bench.alone and not rows.error and any(bench.missing):
            raise DataError("no reply is in two of the files", "rows of one reply have the same `id` in every file")

    files = {"weights": file_hash(weights) if given else weights, "ranked": ranked and file_hash(ranked)}
    run = StageRun("jury", stream, SideBySide(readers), identity(**files, unsorted=unsorted), from_the_start=True)
    about = lambda: findings(bench, *((weigh.jurors, weigh.accuracy) if weigh else (jurors, None)))  # noqa: E731
    run.about = lambda: {"jury": about()}
    run.run(make)
    if not stream.quiet:
        for line in lines(about()):
            say(f"srlm jury: {line}")


def as_lines(outcomes: Iterable[Outcome], judge: Record) -> Iterator[Outcome]:
    """Yield the outcomes with their rows as lines; `judge`, the last field, is the same in all and encoded once."""
    end = b', "judge": ' + encode_row(judge).rstrip() + b"}\n"
    for outcome in outcomes:
        for at, row in enumerate(outcome.rows):
            del row["judge"]
            outcome.rows[at] = encode_row(row).removesuffix(b"}\n") + end
        yield outcome


def refuse_clashes(paths: list[str], ranked: str | None, weights: str) -> None:
    """Raise OptionError for a file that is given twice, and for people's rankings that nothing would use."""
    for number, path in enumerate(paths):
        for other in paths[:number]:
            if path == other or ("-" not in (path, other) and same_file(path, other)):
                raise OptionError(f"--in {shown(path)} is given twice", "each juror has its own file")
    if ranked and weights != "accuracy":
        raise OptionError("--ranked has nothing to weigh", "add --weights accuracy")
    if ranked == "-" and "-" in paths:
        raise OptionError("stdin can be only one of the files", "--ranked has to name a file")


def weights_of_file(path: str) -> dict[str, float]:
    """Return the weights in a JSON file by the name of the juror."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        hint = "--weights takes equal, accuracy or a JSON file"
        raise OptionError(f"cannot open {path}: {error.strerror}", hint) from None
    except ValueError as error:
        raise OptionError(f"{path}: not JSON: {error}") from None
    right = isinstance(found, dict) and all(
        is_number(weight) and 0 <= weight < float("inf") for weight in found.values()
    )
    if not right or not any(found.values()):
        raise OptionError(f"{path}: expected an object of juror and weight, a number from 0 up and not all 0")
    return found


def jurors_of(readers: list[Reader], given: Mapping[str, float] | None, path: str) -> list[stage.Juror]:
    """Return the juror of each file; raise OptionError for different scales, and for weights of other jurors."""
    judges = [judge_of(reader.peek()) for reader in readers]
    files = [reader.paths[0] for reader in readers]
    models = [judge_name({"judge": judge}) for judge in judges]
    names = names_of([model or file for model, file in zip(models, files, strict=True)], files)
    refuse_kinds({name: kind for name, judge in zip(names, judges, strict=True) if (kind := kind_of(judge))})
    refuse_scales({name: scale for name, judge in zip(names, judges, strict=True) if (scale := scale_of(judge))})
    if given is not None and set(given) != set(names):
        unknown = ", ".join(sorted(set(given) ^ set(names)))
        raise OptionError(f"{path}: the jurors are {', '.join(names)}; missing or not known: {unknown}")
    return [
        stage.Juror(shown(file), name, judge, given[name] if given is not None else 1.0)
        for file, name, judge in zip(files, names, judges, strict=True)
    ]


def judge_of(row: Record | None) -> Record:
    """Return who judged a row, as an object."""
    judge = row.get("judge") if row else None
    return judge if isinstance(judge, dict) else {"model": judge if isinstance(judge, str) else None}


def kind_of(judge: Record) -> str | None:
    """Return what the scores of a judge of srlm mean, by the option that asks for them; None for another judge."""
    if isinstance(jurors := judge.get("jurors"), list):
        return next((kind_of(one) for one in jurors if isinstance(one, dict)), None)
    if judge.get("implicit"):
        return "--implicit"
    if judge.get("engine") == "reward":
        return "--engine reward"
    return "--by pairwise" if judge.get("by") == "pairwise" else judge.get("template") and "a template"


def refuse_kinds(kinds: Mapping[str, str]) -> None:
    """Raise OptionError for scores on a fixed scale beside others, or for two kinds of others."""
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{name} by {kind}" for name, kind in kinds.items())
        hint = "join judges of one kind; make-pairs --consistency-with FILE --agreement pair confirms pairs by another"
        raise OptionError(f"the scores of the jurors have no common scale: {shown}", hint)


def scale_of(judge: Record) -> tuple[float, float] | None:
    """Return the lowest and the highest score of a judge with a built-in template, else None."""
    name = judge.get("template")
    if name not in templates.names():
        return None
    try:
        form = load_group(name) if judge.get("by") == "group" else templates.load_judge(name)
    except OptionError:
        return None
    return (form.low, form.high) if form.hash == judge.get("template_hash") else None


def refuse_scales(scales: Mapping[str, tuple[float, float]]) -> None:
    """Raise OptionError unless all scales are the same: the mean would be no score of any."""
    if len(set(scales.values())) > 1:
        shown = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in scales.items())
        raise OptionError(f"the jurors score on different scales: {shown}", "judge with templates of one scale")


class Weighing:
    """Weights by agreement with people: the joined rows wait on disk until all of them are known."""

    def __init__(self, jurors: list[stage.Juror], people: Mapping[str, float] | None) -> None:
        self.jurors, self.people = jurors, people
        self.accuracy = stage.Accuracy(len(jurors))

    def outcomes(self, joined: Iterator[Outcome], rows: SideBySide) -> Iterator[Outcome]:
        """Yield the outcomes with the scores that the weights give, all of them at the end."""
        kept = spill.Rows()
        for outcome in joined:
            self.accuracy.add([self.human(row) for row in outcome.rows], [row["scores"] for row in outcome.rows])
            kept.add(vars(outcome))
        if rows.error:
            return
        for number, outcome in enumerate(Outcome(**values) for values in kept):
            if not number:
                self.jurors = self.weighed()
                judge = stage.judge_of(self.jurors)
            made = [stage.reweighted(row, self.jurors, judge) for row in outcome.rows]
            unscored = sum(row["score"] is None for row in made)
            yield replace(outcome, rows=made, counts=outcome.counts | {"unscored": unscored}, at_end=True)

    def human(self, row: Record) -> float | None:
        """Return what people thought of a reply, None where it is not known."""
        value = self.people.get(reply_key(row)) if self.people is not None else row.get("human")
        return value if is_number(value) else None

    def weighed(self) -> list[stage.Juror]:
        """Return the jurors with their weights; raise DataError if none has one."""
        if not any(self.accuracy.pairs):
            hint = "--ranked FILE has to hold their prompts and texts"
            raise DataError("--weights accuracy: people ordered no two of the replies that a juror scored", hint)
        weights = self.accuracy.weights()
        if not any(weights):
            raise DataError("--weights accuracy: no juror orders replies better than chance", "--weights equal")
        return [replace(juror, weight=weight) for juror, weight in zip(self.jurors, weights, strict=True)]


# --- what is reported ------------------------------------------------------------------------


def findings(bench: stage.Bench, jurors: list[stage.Juror], accuracy: stage.Accuracy | None) -> Record:
    """Return how far the jurors agree, and what is known of each, for FILE.meta.json."""
    names = [juror.name for juror in jurors]
    pairs = [
        {"jurors": [names[at] for at in found["raters"]], **{key: found[key] for key in found if key != "raters"}}
        for found in bench.reliability.of_pairs()
    ]
    known = [
        {
            "name": juror.name,
            "file": juror.file,
            "judge": juror.judge,
            "weight": juror.weight,
            "missing": bench.missing[at],
            "unscored": bench.unscored[at],
            **(accuracy.of(at) if accuracy else {}),
        }
        for at, juror in enumerate(jurors)
    ]
    return {"alpha": bench.reliability.alpha(), "n": bench.reliability.units, "pairs": pairs, "jurors": known}


def lines(found: Record) -> Iterator[str]:
    """Yield the findings in lines for people."""
    number = lambda value: "not defined" if value is None else f"{value:.3f}"  # noqa: E731
    yield f"Krippendorff's alpha {number(found['alpha'])} (interval), {found['n']} replies with two scores or more"
    for pair in found["pairs"]:
        yield (
            f"{' and '.join(pair['jurors'])}: weighted kappa {number(pair['kappa'])}, "
            f"same score {number(pair['same_score'])} of {pair['n']} replies, "
            f"same order {number(pair['same_order'])} of {pair['n_order']} pairs of replies"
        )
    for juror in found["jurors"]:
        accuracy = f", accuracy {number(juror['accuracy'])} of {juror['n']} pairs" if "accuracy" in juror else ""
        yield (
            f"{juror['name']}: weight {juror['weight']:.3g}{accuracy}, {juror['missing']} replies missing, "
            f"{juror['unscored']} without a score"
        )
