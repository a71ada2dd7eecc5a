"""srlm sft."""

from typing import Annotated, Literal

from typer import Option

from srlm_cli import records
from srlm_cli.commands import run, training
from srlm_cli.commands.grouping import grouped
from srlm_cli.commands.held_out import HeldOut, refusing
from srlm_cli.commands.options import new_app
from srlm_cli.streams.reader import read_all

app = new_app()

OnLong = Literal["stop", "drop"]


@app.command()
@grouped
def sft(
    options: training.TrainOptions,
    in_: Annotated[
        list[str] | None,
        Option("--in", "-i", metavar="FILE", help="JSONL to read, can be given several times; - is stdin."),
    ] = None,
    eval_in: training.EvalIn = None,
    held_out: HeldOut = None,
    on_long: Annotated[
        OnLong, Option("--on-long", help="An EFT row over --max-length, whose score would be cut: stop, or drop it.")
    ] = "stop",
) -> None:
    """Fine-tune a model on prompts and completions (IFT and EFT): M0 to M1.

    \b
    Examples:
      srlm sft --in ift.jsonl --in eft.jsonl --model smollm2-135m-instruct --out M1/model
      cat ift.jsonl eft.jsonl | srlm sft --model meta-llama/Llama-2-70b-hf --out M1/model
      srlm sft --in ift.jsonl --model smollm2-135m-instruct --lora-r 16 --learning-rate 2e-4 --out adapter

    Reads rows of `prompt` and `completion` (also alpaca, sharegpt and `messages` rows), writes a
    model folder: weights, tokenizer, chat template and, last, provenance.json. Loss is on target
    tokens only. Prints one JSON line of results. The defaults are the paper's: batch 16, learning
    rate 5.5e-6 falling to 1.1e-6 by a cosine. Number of epochs is not stated there; ours is 1. An
    EFT row whose score would be cut off by --max-length is refused, or left out by `--on-long drop`. A
    training that was killed goes on from its last checkpoint when the same command is run again.
    """
    from srlm_cli.train.sft import sft as train

    spec = options.spec()
    reader = run.reader(
        options, refusing(records.completion_record, [*(held_out or []), *([eval_in] if eval_in else [])]), in_ or ["-"]
    )
    rows = run.all_rows(reader)
    held = read_all(eval_in, records.completion_record) if eval_in else None
    about = training.provenance("sft", spec, reader)
    results = training.guarded(
        lambda: train(rows, spec, drop_long=on_long == "drop", eval_rows=held, run=options.run(), provenance=about),
        spec.out,
    )
    training.finish("sft", spec, reader, results)
