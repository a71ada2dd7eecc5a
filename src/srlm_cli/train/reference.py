"""The reference policy of DPO: which model it is, and the proof that training is tied to that one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import models
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.train.losses import STARTS_AT_LN2, Preference
from srlm_cli.train.session import PROVENANCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srlm_cli.train.trainers import PairTrainer

LN2 = math.log(2)
TOLERANCE = 1e-3  # of a log-probability: what float32, or bfloat16 over other batches, may differ by
CHECKED = 4  # rows, before the first step
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


def check_start(trainer: PairTrainer, model: Any) -> dict[str, float]:
    """Return loss and log-ratios of the first rows before any step, of the trainer's model as it is wrapped.

    Raises SrlmError unless a policy that has `itself` as the reference equals it: log-ratios 0, and loss ln 2 where the
    loss has no constant of its own.
    """
    import torch

    few = range(min(len(trainer.sampler.lengths), trainer.args.per_device_train_batch_size, CHECKED))
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in few]))
    ours, theirs = batch["ref_chosen_logps"].mean().item(), batch["ref_rejected_logps"].mean().item()
    pairs = trainer.items(batch) * trainer.accelerator.num_processes
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
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


def check_scores(model: Any, batch: dict[str, Any], stored: tuple[float, float], about: Preference) -> None:
    """Raise SrlmError unless the stored log-probabilities of the first pair are those of the reference's own logits."""
    import torch

    if about.ld_alpha is not None:
        return
    with torch.no_grad():
        for side, found in zip((0, len(batch["input_ids"]) // 2), stored, strict=True):
            length = int(batch["attention_mask"][side].sum())
            ids = batch["input_ids"][side, :length]
            scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            wanted = batch["completion_mask"][side, 1:length].bool()
            total = float(scores.gather(1, ids[1:, None])[:, 0][wanted].sum())
            if abs(total - found) > 10 * TOLERANCE * max(1.0, abs(total)):
                raise SrlmError(
                    f"the reference's log-probability is {found:.3f}, and {total:.3f} by its own logits",
                    "no model is written; this is a fault of srlm, please report it",
                )
