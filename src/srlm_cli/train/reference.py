"""The reference policy of DPO: which model it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_cli.errors import OptionError
from srlm_cli.models import remote
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_tokenizer
from srlm_cli.models.locate import adapter_base, is_adapter, locate
from srlm_cli.records import PROVENANCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREVIOUS, BASE = "previous", "base"


def resolve(ref: str, model: str) -> str:
    """Return the model that a `--ref` means: `previous` is the policy itself, `base` where its chain began.

    The chain is followed by the provenance.json of each model and the base of each adapter. Raises
    OptionError when a link is missing or is not the model any more that was trained from.
    """
    if ref == PREVIOUS:
        return model
    if ref != BASE:
        locate(ref)
        return ref
    while (before := parent(model)) is not None:
        model = before
    return model


def parent(model: str) -> str | None:
    """Return the model that a model was trained from; None for a full model that srlm did not train."""
    about = Path(model) / PROVENANCE
    if about.is_file():
        origin = json.loads(about.read_text(encoding="utf-8"))["from"]
        if origin.get("revision"):
            remote.pin(origin["model"], origin["revision"])
        try:
            locate(origin["model"])
        except OptionError as error:
            raise OptionError(f"--ref base: {model} was trained from {error.message}", "--ref PATH names it") from None
        if fingerprint(origin["model"]) != origin["fingerprint"]:
            raise OptionError(f"--ref base: {origin['model']} is not what {model} was trained from", "--ref PATH")
        return origin["model"]
    return adapter_base(model) if is_adapter(model) else None


def check_tokens(ref: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OptionError unless a reference has the tokens of the policy."""
    if load_tokenizer(ref).get_vocab() != tokenizer.get_vocab():
        raise OptionError(f"the reference {ref} has a different vocabulary from the model to train", "--ref previous")
