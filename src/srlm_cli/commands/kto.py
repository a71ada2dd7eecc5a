"""srlm kto."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from typer import Option

from srlm_cli.errors import OptionError
from srlm_cli.options.common import new_app
from srlm_cli.options.groups import Defaults, grouped
from srlm_cli.options.held_out import HeldOut, refusing
from srlm_cli.options.training import EvalFile, RefCache, Reference, TrainCommand, TrainOptions
from srlm_cli.runner.inputs import all_rows, open_reader, warn
from srlm_cli.runner.training import finish, guarded, launch_processes, provenance
from srlm_cli.stages.labels import LabelOptions, labelled_record
from srlm_cli.streams.reader import Reader
from srlm_cli.train.losses import KTOLossConfig, UnpairedLoss

app = new_app()


@app.command(cls=TrainCommand)
@grouped
def kto(
    options: Annotated[TrainOptions, Defaults(learning_rate=1e-6, final_learning_rate=1e-7)],
    in_: Annotated[
        list[str] | None,
        Option("--in", "-i", metavar="FILE", help="JSONL file to read (repeatable); - is stdin."),
    ] = None,
    desirable_score: Annotated[
        float | None,
        Option("--desirable-score", help="Judged rows: a score of at least this is desirable."),
    ] = None,
    undesirable_score: Annotated[
        float | None,
        Option("--undesirable-score", help="Judged rows: a score of at most this is undesirable."),
    ] = None,
    eval_file: EvalFile = None,
    held_out: HeldOut = None,
    on_empty: Annotated[
        Literal["stop", "copy"],
        Option("--on-empty", help="When no row is left to train on: stop with exit 3, or copy the model."),
    ] = "stop",
    beta: Annotated[float, Option("--beta", min=0.0, help="KTO beta: strength of the tie to the reference.")] = 0.1,
    ref: Reference = "previous",
    ref_cache: RefCache = True,
    loss: Annotated[UnpairedLoss, Option("--loss", help="Loss; docs/training.md has the formulas.")] = "kto",
    desirable_weight: Annotated[
        float, Option("--desirable-weight", min=0.0, help="Weight of the loss of desirable rows.")
    ] = 1.0,
    undesirable_weight: Annotated[
        float, Option("--undesirable-weight", min=0.0, help="Weight of the loss of undesirable rows.")
    ] = 1.0,
) -> None:
    """Train on single replies that are desirable or not, without pairs (KTO): Mt to M(t+1).

    \b
    Examples:
      srlm kto --in judged.jsonl --desirable-score 4 --undesirable-score 3 --model M1/model --out M2/model
      srlm kto --in labelled.jsonl --model M1/model --desirable-weight 1.5 --out M2/model
      srlm kto --in labelled.jsonl --model M1/model --lora-r 16 --learning-rate 1e-5 --out M2/adapter

    Reads judged rows, whose `score` makes a reply desirable or undesirable (a score in between is left out), or rows
    of `prompt`, `completion` and `label` (true or false), TRL's form. Replies without a text or a score, and those
    that were cut off, are left out and counted. Writes a model folder, checks the reference and resumes a killed
    training as `srlm dpo` does. Prints one JSON line of results. Defaults: TRL's loss, beta and weights; batch 16,
    learning rate 1e-6 falling to 1e-7 by a cosine.
    """
    from srlm_cli.train.kto import kto as train

    launch_processes(options)
    spec = options.spec()
    if options.train_turns == "all":
        raise OptionError(
            "--train-turns all would train on turns that no label is about",
            "--train-turns reply: each turn of a sampled conversation has a row and a score of its own",
        )
    config = KTOLossConfig(beta, loss, desirable_weight, undesirable_weight)
    check = partial(labelled_record, options=LabelOptions(desirable_score, undesirable_score))
    others = [*(held_out or []), *([eval_file] if eval_file else [])]
    reader = open_reader(options, refusing(check, others), in_ or ["-"], beside=others)
    rows = all_rows(reader, origins=True)
    warn("kto", reader.noted)
    held = all_rows(Reader([eval_file], check), origins=True) if eval_file else None
    about = provenance("kto", spec, reader)
    results = guarded(
        lambda: train(
            rows, spec, config, ref=ref, eval_rows=held, provenance=about,
            run=replace(options.run(), on_empty=on_empty, ref_cache=ref_cache),
            refuse=lambda row, reason: reader.refuse_row(row["origin"], reason),
        ),
        spec.out,
    )  # fmt: skip
    finish("kto", spec, reader, results)
