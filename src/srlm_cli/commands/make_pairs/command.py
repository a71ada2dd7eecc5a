"""srlm make-pairs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli import records
from srlm_cli.commands.make_pairs.two_passes import AUTO, agreed, balanced, given_alpha, look_through, reply_candidates
from srlm_cli.errors import DataError, OptionError
from srlm_cli.options.common import Seed, StreamOptions, identity, new_app
from srlm_cli.options.groups import grouped
from srlm_cli.options.unused import Strength, command_with
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.outputs import refuse_own_input
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages import Outcome, judge_pairs
from srlm_cli.stages import make_pairs as stage
from srlm_cli.stages.pair_choice import Choice
from srlm_cli.streams.lookup import Lookup
from srlm_cli.streams.reader import Reader, file_hash, shown

app = new_app()

Of = Literal["responses", "judgements"]
Agreement = Literal["mean", "prompt", "pair"]
TieBreak = Literal["seed", "spread"]
CutOff = Literal["keep", "rejected-only", "drop"]


FILES = ("rejected_pool", "chosen_pool", "consistency_with")


def unused(values: dict[str, Any], strength: Strength) -> tuple[str, int, Collection[str]]:
    """Return the parameters that the pairs have no use for, by what is paired."""
    of_judgements = values["of"] == "judgements"
    return "--of judgements", strength("of"), (*FILES, "cut_off") if of_judgements else ()


@app.command(cls=command_with(unused))
@grouped
def make_pairs(
    stream: StreamOptions,
    seed: Seed = 0,
    of: Annotated[
        Of,
        Option("--of", help="What to pair: responses, or the judgements compared by `judge --meta`."),
    ] = "responses",
    min_gap: Annotated[float, Option("--min-gap", min=0.0, help="Smallest score difference of a pair.")] = 0.0,
    rho: Annotated[
        float,
        Option(
            "--rho",
            min=0.0,
            max=0.5,
            help="Pair the shortest of the best with the longest of the worst, within this share of the score range.",
        ),
    ] = 0.0,
    length_penalty: Annotated[
        str,
        Option(
            "--length-penalty",
            metavar="NUMBER|auto",
            help="Rank by score - alpha * characters; auto: alpha for a mean length gap of zero.",
        ),
    ] = "0",
    rejected_of: Annotated[
        int | None, Option("--rejected-of", min=1, help="Reject the worst of N responses drawn at random, not of all.")
    ] = None,
    max_chosen_length: Annotated[
        int | None, Option("--max-chosen-length", min=1, help="Drop pairs whose chosen response has more characters.")
    ] = None,
    min_chosen_score: Annotated[
        float | None, Option("--min-chosen-score", help="Drop pairs whose chosen response scores less.")
    ] = None,
    rejected_pool: Annotated[
        str | None,
        Option(
            "--rejected-pool",
            metavar="FILE",
            help="Take the rejected response from this file: judged rows of an earlier model.",
        ),
    ] = None,
    chosen_pool: Annotated[
        str | None,
        Option(
            "--chosen-pool",
            metavar="FILE",
            help="Take the chosen response from this file: judged rows of a later model.",
        ),
    ] = None,
    tie_break: Annotated[
        TieBreak,
        Option("--tie-break", help="Choose among the best by seed, or first by the smallest spread of their K scores."),
    ] = "seed",
    consistency_with: Annotated[
        str | None,
        Option(
            "--consistency-with",
            metavar="FILE",
            help="The same responses scored by another judge: weight or keep the pairs by agreement.",
        ),
    ] = None,
    agreement: Annotated[
        Agreement,
        Option(
            "--agreement",
            help="With --consistency-with: weight by the mean over all prompts, or by that of each prompt; pair: no "
            "weights, drop the pairs that the other judge does not order alike.",
        ),
    ] = "mean",
    cut_off: Annotated[
        CutOff,
        Option(
            "--cut-off",
            help="Responses that were cut off (finish_reason length): keep, use as rejected only, or drop them.",
        ),
    ] = "keep",
    shuffle_labels: Annotated[
        bool,
        Option("--shuffle-labels", help="Deal chosen and rejected at random, by --seed: a control, nothing to learn."),
    ] = False,
    unsorted: Annotated[
        bool, Option("--unsorted", help="Input not grouped by prompt: group the rows on disk first.")
    ] = False,
) -> None:
    """Pair the best with the worst response of each prompt.

    \b
    Examples:
      srlm make-pairs --in judged.jsonl --out pairs.jsonl
      srlm judge --in responses.jsonl | srlm make-pairs > pairs.jsonl
      cat judged-*.jsonl | srlm make-pairs --unsorted --min-gap 1
      srlm make-pairs --in ranked.jsonl --out human-pairs.jsonl
      srlm make-pairs --in M2/judged.jsonl --rejected-pool M1/judged.jsonl --rho 0.2 --out pairs.jsonl
      srlm make-pairs --in M2/judged.jsonl --consistency-with M2/implicit.jsonl --agreement pair --out pairs.jsonl
      srlm make-pairs --in M1/judged.jsonl --chosen-pool M2/judged.jsonl --tie-break spread --out pairs.jsonl
      srlm make-pairs --in judged.jsonl --shuffle-labels --seed 1 --out control-pairs.jsonl
      srlm make-pairs --in meta.jsonl --of judgements --out judge-pairs.jsonl

    The highest score is `chosen`, the lowest `rejected`; prompts whose scores are all equal or that
    have fewer than two scored responses are dropped and counted (the paper's rule). The seed decides
    among responses of equal score. A response without a score is never ranked. For ranked rows
    (`responses`) the scores are the human scores or the negated ranks, and the pair has `score_from: human`.
    TRL's DPOTrainer and datasets.load_dataset("json") read the rows.

    Memory stays the same however long the input is. A prompt whose responses are not grouped, as
    after `cat` of files that share prompts, is a bad row (exit 3), unless --unsorted gathers them first: on
    disk, in the folder for temporary files (TMPDIR), which needs room for the rows without their judgements.

    docs/pairs.md has the formula and the source of each variant. `--length-penalty auto`, `--agreement
    mean` and `--of judgements` read --in twice, so it cannot be stdin. With --consistency-with a row has
    `agreement` and `label_smoothing`, which `srlm dpo` uses, except with `--agreement pair`.
    """
    from srlm_cli.commands.make_pairs import pairs_of_ranges

    choice = Choice(
        min_gap=min_gap,
        rho=rho,
        alpha=given_alpha(length_penalty, rho),
        rejected_of=rejected_of,
        max_chosen_length=max_chosen_length,
        min_chosen_score=min_chosen_score,
        seed=seed,
        shuffle_labels=shuffle_labels,
        tie_break=tie_break,
    )
    files = {"rejected_pool": rejected_pool, "chosen_pool": chosen_pool, "consistency_with": consistency_with}
    decides = identity(choice, of=of, unsorted=unsorted, length_penalty=length_penalty, agreement=agreement, **files)
    decides |= {"cut_off": cut_off}
    if of == "judgements":
        if any(files.values()) or cut_off != "keep":
            raise OptionError(
                "--of judgements cannot be used with --rejected-pool, --chosen-pool, --consistency-with or --cut-off"
            )
        pair_judgements(stream, choice, length_penalty, decides)
        return
    if agreement != "mean" and not consistency_with:
        raise OptionError(f"--agreement {agreement} is about the scores of another judge", "--consistency-with FILE")
    refuse_own_input(stream.out, [path for path in files.values() if path])
    found = {name: Lookup(path, stage.scored_record, stage.group_of) for name, path in files.items() if path}
    options = stage.PairOptions(
        **vars(choice),
        unsorted=unsorted,
        earlier=found.get("rejected_pool"),
        later=found.get("chosen_pool"),
        before=found.get("consistency_with"),
        cut_off=cut_off,
        agreed_only=agreement == "pair",
    )
    if length_penalty == AUTO:
        options = replace(options, alpha=balanced(stream, stage.scored_record, reply_candidates(options)))
    if options.before and agreement == "mean":
        options = replace(options, mean_agreement=agreed(stream, options))
    with ExitStack() as processes:
        results = pairs_of_ranges.open_ranges(stream, options, processes)
        rows = open_reader(stream, stage.scored_record, [stream.in_], traced=False, beside=files.values())
        decides |= {name: file_hash(path) for name, path in files.items() if path}
        run = StageRun("make-pairs", stream, rows, decides, from_the_start=True)
        run.about = control(choice)

        def make(rows: Reader, _: Any) -> Iterator[Outcome]:
            yield from pairs_of_ranges.make_pairs(rows, options, results)
            if not rows.error:
                refuse_nothing_common(stream.in_, found)

        run.run(make)


def refuse_nothing_common(path: str, others: dict[str, Lookup]) -> None:
    """Raise DataError for a file that has none of the prompts of the input; an empty input is not an error."""
    for name, other in others.items():
        if other.asked and not other.found:
            option = f"--{name.replace('_', '-')}"
            hint = "two rows are of one prompt when their `prompt_id` or, without one, their prompt text is the same"
            raise DataError(f"no prompt of {shown(path)} is in {other.path}, the file of {option}", hint)


def pair_judgements(stream: StreamOptions, choice: Choice, length_penalty: str, decides: dict[str, Any]) -> None:
    """Rate the judgements of each reply and pair the best with the worst."""
    from srlm_cli.stages.meta_rating import meta_scores, position_weights

    weights = look_through(stream, records.meta_record, position_weights, "--of judgements")
    rate = partial(meta_scores, weights=weights)
    if length_penalty == AUTO:
        candidates = partial(judge_pairs.all_candidates, rate=rate, choice=choice)
        choice = replace(choice, alpha=balanced(stream, records.meta_record, candidates))
    rows = open_reader(stream, records.meta_record, [stream.in_])
    run = StageRun("make-pairs", stream, rows, decides, from_the_start=True)
    run.about = control(choice)
    run.run(lambda rows, _: judge_pairs.judge_pairs(rows, rate, choice))


def control(choice: Choice) -> Callable[[], dict[str, Any]]:
    """Return what FILE.meta.json says of pairs whose labels were shuffled."""
    return lambda: {"shuffle_labels": {"seed": choice.seed}} if choice.shuffle_labels else {}
