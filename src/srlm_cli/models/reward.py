"""Load a reward model: a sequence classifier with one label, whose logit is the score of a dialogue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models import remote
from srlm_cli.models.load import load_config
from srlm_cli.models.load_errors import in_one_line
from srlm_cli.models.locate import is_adapter, locate
from srlm_cli.models.weights import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSIFIER = "ForSequenceClassification"


def check_reward_model(model: str) -> None:
    """Raise an error unless a model is a whole sequence classifier with one label, by its configuration."""
    if is_adapter(locate(model)):
        raise OptionError(f"{model} is an adapter, and --engine reward needs a whole model", "merge it into its base")
    config = load_config(model)
    named = [*(config.architectures or []), *(getattr(config, "auto_map", None) or {})]
    if not any(name.endswith(CLASSIFIER) for name in named):
        kind = f" ({named[0]})" if named else ""
        raise OptionError(
            f"{model}{kind} has no classification head, so it is not a reward model", "--engine hf: it judges in words"
        )
    if config.num_labels != 1:
        raise OptionError(
            f"{model} is a classifier with {config.num_labels} labels, and a reward model has one",
            "a model with num_labels 1 in its config.json",
        )


def load_reward_model(model: str, dtype: str, device: str, attention: str | None = None) -> PreTrainedModel:
    """Return a reward model on a device; raise EngineError if a tensor, such as the head, is missing."""
    import torch
    from transformers import AutoModelForSequenceClassification

    check_reward_model(model)
    where = locate(model)
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": remote.trusts(where)}
    settings |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # `check_tensors` reports them
    settings |= remote.check_attention(attention, remote.trusts(where))
    net, info = in_one_line(model, where, lambda: AutoModelForSequenceClassification.from_pretrained(where, **settings))
    hint = "the weights and config.json do not belong together, or a file is not complete"
    what, total = f"cannot load the model {model}", len(net.state_dict())
    check_tensors(what, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], total, hint)
    if getattr(net, "num_labels", 1) != 1:
        raise EngineError(f"{model} has {net.num_labels} labels")
    return net.eval().to(device)
