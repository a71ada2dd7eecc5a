"""srlm sft."""

from dataclasses import replace
from typing import Annotated, Literal

from typer import Option

from srlm_cli import records
from srlm_cli.errors import OptionError
from srlm_cli.options.common import new_app
from srlm_cli.options.groups import grouped
from srlm_cli.options.held_out import HeldOut, refusing
from srlm_cli.options.training import EvalFile, TrainCommand, TrainOptions, by_input
from srlm_cli.runner.inputs import all_rows, open_reader, warn
from srlm_cli.runner.training import finish, guarded, launch_processes, provenance
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader

app = new_app()

OnLong = Literal["stop", "drop"]


@app.command(cls=TrainCommand)
@grouped
def sft(
    options: TrainOptions,
    in_: Annotated[
        list[str] | None,
        Option("--in", "-i", metavar="FILE", help="JSONL file to read (repeatable); - is stdin."),
    ] = None,
    mix_weight: Annotated[
        list[float] | None,
        Option(
            "--mix-weight",
            min=0.0,
            max=1000.0,
            metavar="<float>",
            help="How often the rows of each --in are used per epoch; one value per --in, in order (repeatable).",
        ),
    ] = None,
    positive_only: Annotated[
        bool, Option("--positive-only", help="Read judged rows; train on responses with the full score of 5.")
    ] = False,
    eval_file: EvalFile = None,
    held_out: HeldOut = None,
    chat_template: Annotated[
        str | None,
        Option(
            "--chat-template",
            metavar="NAME|FILE|MODEL",
            help="Chat template for a base model: chatml, a name such as llama3, a Jinja file, or that of a model.",
        ),
    ] = None,  # fmt: skip
    on_long: Annotated[
        OnLong,
        Option("--on-long", help="EFT row longer than --max-length, whose score would be cut off: stop, or drop it."),
    ] = "stop",
) -> None:
    """Fine-tune a model on prompts and completions (IFT and EFT): M0 to M1.

    \b
    Examples:
      srlm sft --in ift.jsonl --in eft.jsonl --model smollm2-135m-instruct --out M1/model
      cat ift.jsonl eft.jsonl | srlm sft --model meta-llama/Llama-2-70b-hf --chat-template chatml --out M1/model
      srlm sft --in ift.jsonl --in eft.jsonl --mix-weight 1 --mix-weight 0.5 --model M0 --out M1/model
      srlm sft --in ift.jsonl --model smollm2-135m-instruct --lora-r 16 --learning-rate 2e-4 --out adapter

    Reads rows of `prompt` and `completion` (docs/data.md has the forms of other tools), writes a
    model folder: weights, tokenizer, chat template and, last, provenance.json. Loss is on target
    tokens only. Prints one JSON line of results. The defaults are the paper's: batch 16, learning
    rate 5.5e-6 falling to 1.1e-6 by a cosine. The paper does not state the number of epochs;
    the default is 1. An EFT row whose score would be cut off by --max-length is rejected, or dropped with
    `--on-long drop`. Run the same command again to resume a killed training from its last checkpoint.
    """
    from srlm_cli.train.sft import sft as train

    launch_processes(options)
    spec = replace(options.spec(), chat_template=chat_template)
    paths = in_ or ["-"]
    weights = by_input(paths, mix_weight)
    if positive_only and options.train_turns == "all":
        raise OptionError(
            "--train-turns all would train on turns that no score of --positive-only is about",
            "--train-turns reply: each turn of a sampled conversation has a row and a score of its own",
        )
    check = records.judged_completion_record if positive_only else records.completion_record
    others = [*(held_out or []), *([eval_file] if eval_file else [])]
    check = refusing(check, others)
    reader = open_reader(
        options, lambda row: {**check(row), "mix_weight": weights[reader.source]}, paths, beside=others
    )
    rows = all_rows(reader, origins=True)
    warn("sft", reader.noted)
    kept = [row for row in rows if not positive_only or row["full_score"]]
    if positive_only and not options.quiet:
        say(f"srlm sft: {len(kept)} of {len(rows)} responses have the full score of {records.FULL_SCORE}")
    held = all_rows(Reader([eval_file], records.completion_record), origins=True) if eval_file else None
    about = provenance("sft", spec, reader)
    results = guarded(
        lambda: train(
            kept, spec, drop_long=on_long == "drop", eval_rows=held, run=options.run(), provenance=about,
            refuse=lambda row, reason: reader.refuse_row(row["origin"], reason),
        ),
        spec.out,
    )  # fmt: skip
    finish("sft", spec, reader, results)
