"""The reference policy of DPO: which model it is, and the proof that training is tied to that one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import distributed, models
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.train.losses import STARTS_AT_LN2
from srlm_cli.train.session import PROVENANCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srlm_cli.train.trainers import PairTrainer

LN2 = math.log(2)
TOLERANCE = 1e-3  # of a log-probability in float32, by which two batches that hold the same row may differ
CHECKED = 4  # pairs, before the first step
PREVIOUS, BASE = "previous", "base"


def resolve(ref: str, model: str) -> str:
    """Return the model that a `--ref` means: `previous` is the policy itself, `base` where its chain began.

    The chain is followed by the provenance.json of each model and the base of each adapter. Raises
    OptionError when a link is missing or is not the model any more that was trained from.
    """
    if ref == PREVIOUS:
        return model
    if ref != BASE:
        models.locate(ref)
        return ref
    while (before := parent(model)) is not None:
        model = before
    return model


def parent(model: str) -> str | None:
    """Return the model that a model was trained from, or None of one that srlm did not make and that is no adapter."""
    about = Path(model) / PROVENANCE
    if about.is_file():
        origin = json.loads(about.read_text(encoding="utf-8"))["from"]
        try:
            models.locate(origin["model"])
        except OptionError as error:
            raise OptionError(f"--ref base: {model} was trained from {error.message}", "--ref PATH names it") from None
        if models.fingerprint(origin["model"]) != origin["fingerprint"]:
            raise OptionError(f"--ref base: {origin['model']} is not what {model} was trained from", "--ref PATH")
        return origin["model"]
    return models.adapter_base(model) if models.is_adapter(model) else None


def check_tokens(ref: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OptionError unless a reference has the tokens of the policy."""
    if models.load_tokenizer(ref).get_vocab() != tokenizer.get_vocab():
        raise OptionError(f"the reference {ref} has other tokens than the model to train", "--ref previous")


@contextmanager
def in_float32(accelerator: Any) -> Iterator[None]:
    """Leave the autocast of a training out, so that equal passes can be told from unequal ones.

    In bfloat16 the same row differs from batch to batch by more than a wrong reference may do; float32 does not,
    and which model or adapter answers, behind which mask, is the same in both. Sharded weights keep their dtype.
    """
    from accelerate.utils import AutocastKwargs

    before = accelerator.autocast_handler
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    try:
        yield
    finally:
        accelerator.autocast_handler = before


def first_pairs(trainer: PairTrainer) -> dict[str, Any]:
    """Return the batch on which policy and reference are checked before the first step."""
    few = range(min(len(trainer.sampler.lengths), trainer.args.per_device_train_batch_size, CHECKED))
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in few]))


def check_scores(trainer: PairTrainer, model: Any) -> tuple[Any, Any]:
    """Return the reference's log-probabilities of the first pairs in float32, (pairs,) each of chosen and rejected.

    Raises SrlmError unless they are those of the reference's own logits, and those stored, as near as the dtype
    of the training allows.
    """
    import torch

    batch, about = first_pairs(trainer), trainer.about
    scored = {name: value for name, value in batch.items() if name not in trainer.of_a_pair}
    model.eval()
    with in_float32(trainer.accelerator), torch.no_grad(), trainer.accelerator.autocast():
        found = trainer.compute_ref_log_probs(model, scored)
        if about.ld_alpha is not None:
            return found
        for side, of_side in enumerate(found):
            row = side * len(of_side)
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row, :length]
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            wanted = batch["completion_mask"][row, 1:length].bool()
            total = float(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][wanted].sum())
            stored = float(batch[("ref_chosen_logps", "ref_rejected_logps")[side]][0])
            near = 10 * TOLERANCE * max(1.0, abs(total))
            rounded = rounding(trainer, logits[wanted])
            exact = near + rounded if distributed.sharded() else near
            for name, value, allowed in (("", float(of_side[0]), exact), ("stored ", stored, near + rounded)):
                if not abs(total - value) <= allowed:
                    raise SrlmError(
                        f"the reference's {name}log-probability is {value:.3f}, and {total:.3f} by its own logits",
                        "no model is written; this is a fault of srlm, please report it",
                    )
    return found


def rounding(trainer: PairTrainer, logits: Any) -> float:
    """Return by how much bfloat16 may move the summed log-probability of tokens with (tokens, vocabulary) logits.

    It keeps 8 bits of a number, so each addition to the residual stream errs by up to 2^-9 of it; the errors of
    2 x layers additions grow as their square root, and reach a token's logits in proportion. 0 in float32.
    """
    if not trainer.args.bf16:
        return 0.0
    layers = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().num_hidden_layers
    return float(logits.abs().amax(-1).sum()) * math.sqrt(2 * layers) * 2**-9


def check_start(trainer: PairTrainer, model: Any, scores: tuple[Any, Any] | None) -> dict[str, float]:
    """Return loss and log-ratios of the first pairs before any step, of the trainer's model as it is wrapped.

    `scores` are the reference's of these pairs, in float32, None for a loss without a reference. Raises SrlmError
    unless a policy that has `itself` as the reference equals it: log-ratios 0, and loss ln 2 where the loss has no
    constant of its own.
    """
    import torch

    batch = first_pairs(trainer)
    if scores is not None:
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = scores
    ours, theirs = batch["ref_chosen_logps"].mean().item(), batch["ref_rejected_logps"].mean().item()
    pairs = trainer.items(batch) * trainer.accelerator.num_processes
    model.eval()
    with in_float32(trainer.accelerator), torch.no_grad(), trainer.accelerator.autocast():
        loss = float(trainer.compute_loss(model, batch, num_items_in_batch=pairs))
    found = {name: sum(values) / len(values) for name, values in trainer._metrics["eval"].items()}
    trainer._metrics["eval"].clear()
    ratios = (found["logps/chosen"] - ours, found["logps/rejected"] - theirs)
    about = trainer.about
    if trainer.itself and about.has_reference:
        scale = TOLERANCE * max(1.0, abs(ours), abs(theirs))
        apart = not max(map(abs, ratios)) <= scale
        if about.loss in STARTS_AT_LN2 and not about.nll_alpha:
            apart = apart or abs(loss - LN2) > max(1.0, about.beta) * scale
        if apart:
            raise SrlmError(
                f"policy and reference differ before the first step: log-ratios {ratios[0]:.4f} and {ratios[1]:.4f}, "
                f"loss {loss:.4f}, not 0, 0 and ln 2",
                "no model is written; this is a fault of srlm, please report it",
            )
    return {"loss": loss, "log_ratio_chosen": ratios[0], "log_ratio_rejected": ratios[1]}
