"""srlm dpo."""

from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from typer import BadParameter, Option

from srlm_cli import records
from srlm_cli.errors import OptionError
from srlm_cli.options.common import new_app
from srlm_cli.options.groups import Defaults, grouped
from srlm_cli.options.held_out import HeldOut, refusing
from srlm_cli.options.training import EvalFile, RefCache, Reference, TrainOptions
from srlm_cli.options.training import needs as training_needs
from srlm_cli.options.unused import command_with
from srlm_cli.runner.inputs import all_rows, open_reader, warn
from srlm_cli.runner.training import finish, guarded, launch_processes, provenance
from srlm_cli.streams.reader import Reader
from srlm_cli.train.losses import CONSTANTS, DPOLossConfig, Loss, weighted
from srlm_cli.train.options import RefSync

app = new_app()


def loss_of(name: str) -> str:
    """Return the name of a loss; typer has no list of choices."""
    if name not in get_args(Loss):
        raise BadParameter(f"{name!r} is not one of {', '.join(map(repr, get_args(Loss)))}.")
    return name


def needs(values: dict[str, Any]) -> dict[str, str]:
    """Return the parameters that no loss has, or that need an adapter, with the option that they lack."""
    losses = set(values["loss"] or ["sigmoid"])
    found = {name: f"--loss {loss}" for name, loss in CONSTANTS.items() if loss not in losses}
    return found | training_needs(values) | ({"ref": "a --loss with a reference"} if losses == {"simpo"} else {})


@app.command(cls=command_with(needs=needs))
@grouped
def dpo(
    options: Annotated[TrainOptions, Defaults(learning_rate=1e-6, final_learning_rate=1e-7)],
    in_: Annotated[
        list[str] | None,
        Option("--in", "-i", metavar="FILE", help="JSONL file to read (repeatable); - is stdin."),
    ] = None,
    eval_file: EvalFile = None,
    held_out: HeldOut = None,
    on_empty: Annotated[
        Literal["stop", "copy"],
        Option("--on-empty", help="When no pair is left to train on: stop with exit 3, or copy the model."),
    ] = "stop",
    beta: Annotated[
        float, Option("--beta", min=0.0, help="DPO beta: strength of the tie to the reference (the paper: 0.1).")
    ] = 0.1,
    ref: Reference = "previous",
    ref_cache: RefCache = True,
    ref_sync_steps: Annotated[
        int,
        Option(
            "--ref-sync-steps",
            min=0,
            show_default="never",
            help="TR-DPO: mix the policy into the reference every N steps.",
        ),
    ] = 0,
    ref_mixup: Annotated[
        float | None,
        Option(
            "--ref-mixup",
            min=0.0,
            max=1.0,
            show_default="0.6",
            help="With --ref-sync-steps: share of the policy in the new reference.",
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        Option(
            "--loss",
            metavar=f"<{'|'.join(get_args(Loss))}>",
            parser=loss_of,
            show_default="sigmoid",
            help="Preference loss (repeatable: their sum); docs/training.md has the formulas.",
        ),
    ] = None,
    loss_weight: Annotated[
        list[float] | None,
        Option(
            "--loss-weight",
            min=0.0,
            metavar="<float>",
            show_default="1",
            help="Weight of each --loss; one value per --loss, in order (repeatable).",
        ),
    ] = None,
    label_smoothing: Annotated[
        float,
        Option("--label-smoothing", min=0.0, max=0.5, help="Assumed share of pairs with swapped labels."),
    ] = 0.0,
    nll_alpha: Annotated[
        float, Option("--nll-alpha", min=0.0, help="Weight of the chosen reply's negative log-likelihood per token.")
    ] = 0.0,
    ld_alpha: Annotated[
        float | None,
        Option(
            "--ld-alpha", min=0.0, max=1.0, help="LD-DPO: weight of the tokens beyond the length of the shorter reply."
        ),
    ] = None,
    rdpo_alpha: Annotated[
        float, Option("--rdpo-alpha", min=0.0, help="r-dpo: penalty per token of length difference.")
    ] = 0.01,
    gamma: Annotated[float, Option("--gamma", min=0.0, help="simpo: target margin.")] = 1.0,
    positive_lambda: Annotated[
        float,
        Option("--positive-lambda", min=0.0, help="dpo-positive: penalty when the chosen reply becomes less probable."),
    ] = 50.0,
    use_weighting: Annotated[
        bool,
        Option(
            "--use-weighting/--no-use-weighting",
            help="WPO: weight each pair by how probable both replies are under the policy.",
        ),
    ] = False,
) -> None:
    """Train on preference pairs from Mt, with Mt as the reference: Mt to M(t+1).

    \b
    Examples:
      srlm dpo --in M1/pairs.jsonl --model M1/model --out M2/model
      srlm make-pairs --in judged.jsonl | srlm dpo --model M1/model --out M2/model
      srlm dpo --in pairs.jsonl --model M1/model --lora-r 16 --learning-rate 1e-5 --out M2/adapter
      srlm dpo --in pairs.jsonl --model M1/model --loss sigmoid --loss apo-zero --out M2/model
      srlm dpo --in pairs.jsonl --model M1/model --out M2/model --dry-run

    Reads rows of `prompt`, `chosen` and `rejected` (docs/data.md has the forms of other tools), writes a
    model folder: weights, tokenizer, chat template and, last, provenance.json. The reference is the
    starting model, checked before the first step (log-ratios 0, loss ln 2), or the model of --ref. Prints
    one JSON line of results. The defaults are the paper's: beta 0.1, sigmoid loss, batch 16, learning
    rate 1e-6 falling to 1e-7 by a cosine. Run the same command again to resume a killed training from its
    last checkpoint.
    """
    from srlm_cli.train.dpo import dpo as train

    launch_processes(options)
    spec = options.spec()
    losses = weighted(loss or ["sigmoid"], loss_weight or [])
    preference = DPOLossConfig(
        beta, losses, label_smoothing, nll_alpha, ld_alpha, rdpo_alpha, gamma, positive_lambda, use_weighting
    )
    if ref_mixup is not None and not ref_sync_steps:
        raise OptionError("--ref-mixup needs --ref-sync-steps")
    sync = RefSync(ref_sync_steps, 0.6 if ref_mixup is None else ref_mixup) if ref_sync_steps else None
    others = [*(held_out or []), *([eval_file] if eval_file else [])]
    reader = open_reader(options, refusing(records.pair_record, others), in_ or ["-"], beside=others)
    rows = all_rows(reader, origins=True)
    warn("dpo", reader.noted)
    held = all_rows(Reader([eval_file], records.pair_record), origins=True) if eval_file else None
    about = provenance("dpo", spec, reader)
    results = guarded(
        lambda: train(
            rows, spec, preference, ref=ref, sync=sync, eval_rows=held, provenance=about,
            run=replace(options.run(), on_empty=on_empty, ref_cache=ref_cache),
            refuse=lambda row, reason: reader.refuse_row(row["origin"], reason),
        ),
        spec.out,
    )  # fmt: skip
    finish("dpo", spec, reader, results)
