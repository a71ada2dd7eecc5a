"""Score replies with a reward model: a sequence classifier of transformers with one label."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from srlm_cli.engines.base import EngineSpec, Scored
from srlm_cli.engines.chat_template import ChatTemplate, assistant, token_ids
from srlm_cli.errors import BadRow
from srlm_cli.models.collection import without_collection
from srlm_cli.models.hardware import pick_device, pick_dtype
from srlm_cli.models.load import context_of, load_tokenizer, quiet_libraries
from srlm_cli.models.reward import load_reward_model
from srlm_cli.records import Record, as_messages

TOKENS = 16384  # of a batch, with its padding


class RewardModel:
    """A reward model and its tokenizer, loaded once. A score is the logit of a dialogue in its chat template.

    On a CPU each reply is read alone, so that its score does not depend on the others: a resumed run or a shard
    gives the same bytes. Elsewhere replies of similar length are read together, which changes a score by rounding.
    """

    kind = "reward"

    def __init__(self, spec: EngineSpec) -> None:
        quiet_libraries()
        self.device = pick_device(spec.device)
        dtype = "float32" if spec.dtype == "auto" and self.device == "cpu" else pick_dtype(spec.dtype, self.device)
        with without_collection():
            self.net = load_reward_model(spec.model, dtype, self.device, spec.attn_implementation)
        self.tokenizer = load_tokenizer(spec.model)
        self.template = ChatTemplate.of(self.tokenizer, spec)
        self.context = context_of(spec.model) or 1 << 30
        self.padding = getattr(self.net.config.get_text_config(), "pad_token_id", None)
        self.together = 1 if self.device == "cpu" or self.padding is None else spec.batch_size

    def score(self, replies: list[Record]) -> list[Scored]:
        """Return the score of each response record, in order; thoughts are left out."""
        found: list[Scored | None] = []
        texts: list[list[int]] = []
        for row in replies:
            try:
                text = self.template.render(
                    [*as_messages(row["prompt"]), assistant(row["response"])], add_generation_prompt=False
                )
            except BadRow as error:
                found.append(Scored(bad=str(error)))
                continue
            ids = token_ids(self.tokenizer, text)
            if len(ids) > self.context:
                found.append(Scored(tokens=len(ids)))
                continue
            found.append(None)
            texts.append(ids)
        scores = iter(self.logits(texts))
        tokens = iter(texts)
        return [one or Scored(next(scores), len(next(tokens))) for one in found]

    def logits(self, texts: list[list[int]]) -> list[float]:
        """Return the logit of each text, in order."""
        scores = [0.0] * len(texts)
        for some in self._batches(texts):
            longest = max(len(texts[at]) for at in some)
            padding = self.padding if self.together > 1 else 0
            ids = torch.tensor([texts[at] + [padding] * (longest - len(texts[at])) for at in some])
            mask = torch.tensor([[1] * len(texts[at]) + [0] * (longest - len(texts[at])) for at in some])
            with torch.inference_mode():
                made = self.net(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
            for at, score in zip(some, made[:, 0].float().tolist(), strict=True):
                scores[at] = score
        return scores

    def _batches(self, texts: list[list[int]]) -> Iterator[list[int]]:
        """Yield the places of the texts that are read together, the longest first: similar lengths, little padding."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        while order:
            fit = max(1, min(self.together, TOKENS // max(len(texts[order[0]]), 1)))
            yield order[:fit]
            del order[:fit]
