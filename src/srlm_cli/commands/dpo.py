"""srlm dpo."""

from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.commands import run, training
from srlm_cli.commands.grouping import Defaults, grouped
from srlm_cli.commands.held_out import HeldOut, refusing
from srlm_cli.commands.options import new_app

app = new_app()


@app.command()
@grouped
def dpo(
    options: Annotated[training.TrainOptions, Defaults(learning_rate=1e-6, final_learning_rate=1e-7)],
    in_: Annotated[
        list[str] | None,
        Option("--in", "-i", metavar="FILE", help="JSONL to read, can be given several times; - is stdin."),
    ] = None,
    held_out: HeldOut = None,
    beta: Annotated[
        float, Option("--beta", min=0.0, help="Strength of the tie to the reference (the paper: 0.1).")
    ] = 0.1,
) -> None:
    """Train on preference pairs from Mt, with Mt as the reference: Mt to M(t+1).

    \b
    Examples:
      srlm dpo --in M1/pairs.jsonl --model M1/model --out M2/model
      srlm make-pairs --in judged.jsonl | srlm dpo --model M1/model --out M2/model
      srlm dpo --in pairs.jsonl --model M1/model --lora-r 16 --learning-rate 1e-5 --out M2/adapter

    Reads rows of `prompt`, `chosen` and `rejected`, writes a model folder: weights, tokenizer, chat
    template and, last, provenance.json. The reference is always the model that training starts
    from, which the first loss (ln 2) proves. Prints one JSON line of results. The defaults are the
    paper's: beta 0.1, sigmoid loss, batch 16, learning rate 1e-6 falling to 1e-7 by a cosine.
    """
    from srlm_cli.train.dpo import dpo as train

    spec = options.spec()
    reader = run.reader(options, refusing(records.pair_record, held_out), in_ or ["-"])
    rows = run.all_rows(reader)
    about = training.provenance("dpo", spec, reader)
    results = training.guarded(lambda: train(rows, spec, beta, quiet=options.quiet, provenance=about), spec.out)
    training.finish("dpo", spec, reader, results)
