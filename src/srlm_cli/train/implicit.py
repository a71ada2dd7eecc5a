"""DPO's implicit reward: what a model prefers by its training, beta * (logp of the policy - logp of the reference)."""

from __future__ import annotations

from pathlib import Path

import torch

from srlm_cli.engines.base import EngineSpec, Scored
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.models.collection import without_collection
from srlm_cli.models.hardware import pick_device, pick_dtype
from srlm_cli.models.load import context_of, end_of_turn_ids, load_model, load_tokenizer, quiet_libraries
from srlm_cli.models.locate import locate
from srlm_cli.records import KWARGS, Record, reply_message
from srlm_cli.train import reference
from srlm_cli.train.packing import Packing
from srlm_cli.train.render import Renderer

PARENT = "parent"  # the reference by default: the model that this one was trained from
BETA = 0.1


def reference_of(ref: str, model: str) -> str:
    """Return the reference that `--ref` means: `parent` is the model that this one was trained from, `base` the first.

    Raises OptionError where it is not known, or is the model itself: all rewards would be 0.
    """
    where = locate(model)
    found = reference.parent(model) if ref == PARENT else reference.resolve(ref, model)
    if found is None or found == model:
        missing = "" if Path(where).is_dir() else f", and there is no folder {model}"
        raise OptionError(f"--implicit needs the model that {model} was trained from{missing}", "--ref MODEL names it")
    return found


class ImplicitReward:
    """Policy and reference, loaded once. The reply is rendered as `srlm dpo` trains it, with its thought if it has one.

    Each reply is read alone: its reward does not depend on the others.
    """

    kind = "implicit"

    def __init__(self, spec: EngineSpec, ref: str, beta: float) -> None:
        quiet_libraries()
        self.beta, self.device = beta, pick_device(spec.device)
        dtype = "float32" if spec.dtype == "auto" and self.device == "cpu" else pick_dtype(spec.dtype, self.device)
        tokenizer = load_tokenizer(spec.model)
        reference.check_tokens(ref, tokenizer)
        self.renderer = Renderer(tokenizer, ChatTemplate.of(tokenizer, spec), end_of_turn_ids(spec.model))
        self.context = min(context_of(model) or 1 << 30 for model in (spec.model, ref))
        with without_collection():
            self.policy, self.ref = (
                Packing(load_model(model, dtype, self.device, attention=spec.attn_implementation).eval())
                for model in (spec.model, ref)
            )

    def score(self, replies: list[Record]) -> list[Scored]:
        """Return the implicit reward of each response record, in order."""
        return [self._scored(row) for row in replies]

    def _scored(self, row: Record) -> Scored:
        rendered = {"prompt": row["prompt"], "completion": [reply_message(row)], KWARGS: row.get(KWARGS)}
        try:
            [sequence] = self.renderer.rendered(rendered, ("completion",))
        except BadRow as error:
            return Scored(bad=str(error))
        if len(sequence.ids) > self.context:
            return Scored(tokens=2 * len(sequence.ids))
        ratio = log_prob(self.policy, sequence.ids, sequence.start) - log_prob(self.ref, sequence.ids, sequence.start)
        return Scored(self.beta * ratio, 2 * len(sequence.ids))


def log_prob(packing: Packing, ids: list[int], start: int) -> float:
    """Return the summed log-probability of the tokens from `start` on."""
    model = packing.bare
    targets = torch.tensor(ids[start:], device=model.device)
    with torch.inference_mode():
        if model.device.type == "cpu":
            [logits] = packing.logits(model, [ids], [list(range(start - 1, len(ids) - 1))])
        else:
            text = torch.tensor([ids], device=model.device)
            logits = model(input_ids=text, use_cache=False).logits[0, start - 1 : -1].float()
        return -float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
