"""srlm eval length-control."""

from typing import Annotated

from typer import Option

from srlm_cli.evaluate import length_control as pure
from srlm_cli.options.common import In, Out, ReadOptions, Seed
from srlm_cli.options.groups import grouped
from srlm_cli.runner.inputs import check_whole, finished, open_reader
from srlm_cli.runner.outputs import refuse_own_input
from srlm_cli.runner.stage import write_metrics
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader


@grouped
def length_control(
    read: ReadOptions,
    in_: In = "-",
    out: Out = "-",
    reference: Annotated[
        str | None,
        Option(
            "--reference",
            metavar="FILE",
            help="Comparisons of the baseline with longer and shorter variants of itself.",
        ),
    ] = None,
    inverse_penalty: Annotated[
        float,
        Option(
            "--inverse-penalty",
            min=0.001,
            help="Inverse regularization strength C: smaller values shrink the coefficients more.",
        ),
    ] = pure.C,
    seed: Seed = 0,
) -> None:
    """Estimate the win rate at equal lengths with the model of AlpacaEval 2.

    \b
    Examples:
      srlm eval length-control --in matches.jsonl
      srlm eval length-control --in preferences.jsonl --reference variants.jsonl --out metrics.jsonl

    Reads matches of `srlm eval head-to-head --matches`, or rows with `model`, `index` (the prompt),
    `len_baseline`, `len_model`, `preference` (1: the baseline is better, 2: the model is better) and
    optionally `difficulty`, for one or more models. Fits the effect of length on the preference
    (arXiv 2404.04475). Writes, for each model, `win_rate`, `length_controlled_win_rate` with the fitted
    terms, and the mean lengths. --reference takes rows in the same formats, with each variant of the
    baseline as a model. The interval is a bootstrap over prompts with --seed.
    """
    refuse_own_input(out, [in_, *([reference] if reference else [])])
    variants = compared(Reader([reference], pure.preference_record, traced=False)) if reference else {}
    reader = open_reader(read, pure.preference_record, [in_], traced=False, beside=[out])
    models = compared(reader)
    metrics, left_out = pure.length_control(models, variants, inverse_penalty, seed)
    count = sum(map(len, models.values()))
    write_metrics("eval length-control", out, metrics, reader, read=count, quiet=read.quiet)
    if left_out and not read.quiet:
        say(f"srlm eval length-control: {left_out}")


def compared(reader: Reader) -> pure.Variants:
    """Return all comparisons of a file, model by model; a bad row raises DataError."""
    models = pure.by_model(finished(reader))
    check_whole(reader)
    return models
