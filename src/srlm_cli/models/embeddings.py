"""Tokens that an adapter adds: the embeddings of its base are resized, and every token has an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError
from srlm_cli.models import remote
from srlm_cli.models.files import read_settings
from srlm_cli.models.weights import first_names

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def resize_embeddings(base: PreTrainedModel, folder: str, config: PeftConfig, tensors: dict[str, Any]) -> bool:
    """Resize the embeddings of a base model to those of an adapter; return whether the adapter's file has whole ones.

    `tensors` are the adapter's by plain name. Raises EngineError if added tokens would keep random embeddings, in the
    input or in the output.
    """
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    layers = [name for name, module in base.named_modules() if module in (inputs, outputs)]  # the input first
    saved = {name: rows for name in layers if (rows := saved_rows(name, tensors))}
    trained = [trained_tokens(config, name, first=name == layers[0]) for name in layers]
    old = len(inputs.weight)
    new = max(saved.values()) if saved else max([old, *(token + 1 for token in set().union(*trained))])
    if new != old:
        base.resize_token_embeddings(new, mean_resizing=False)
    tied = base.get_input_embeddings().weight is getattr(base.get_output_embeddings(), "weight", None)
    whole = {name for name in saved if name.rsplit(".", 1)[-1] not in (config.modules_to_save or ())}
    shared = tied and (whole or getattr(config, "ensure_weight_tying", False))
    added = set(range(old, new))
    by_token = [added <= tokens or (tied and added <= trained[0]) for tokens in trained]
    random = [name for name, known in zip(layers, by_token, strict=True) if not (name in saved or shared or known)]
    if new > old and random:
        raise EngineError(
            f"cannot load the model {folder}: it adds {new - old} tokens, but does not contain {random[0]}",
            "save the adapter with save_embedding_layers=True, or with both embeddings in modules_to_save",
        )
    return bool(whole)


def saved_rows(layer: str, tensors: dict[str, Any]) -> int:
    """Return the number of rows of an embedding layer in an adapter's file, 0 if it is not there."""
    return next((len(tensors[name]) for name in tensors if f".{name}".endswith(f".{layer}.weight")), 0)


def trained_tokens(config: PeftConfig, layer: str, *, first: bool) -> set[int]:
    """Return the ids of tokens whose embeddings in a layer an adapter trains individually; a list is of the first."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    if not isinstance(found, dict):
        return set(found) if first else set()
    return {token for name, ids in found.items() if f".{layer}".endswith(f".{name}") for token in ids}


def check_tokens(folder: str, base: str, rows: int) -> None:
    """Raise EngineError if the tokenizer of an adapter has added tokens without an embedding."""
    added = added_tokens(folder)
    if max(added.values(), default=0) < rows:
        return
    known = added_tokens(base)  # Gemma 3 itself has a token without an embedding
    if unknown := sorted(token for token, number in added.items() if number >= rows and token not in known):
        raise EngineError(
            f"cannot load the model {folder}: no embeddings for {len(unknown)} tokens of its tokenizer "
            f"({first_names(unknown)}), neither in it nor in its base {base}",
            "save the adapter with its embeddings, or use the tokenizer of the base",
        )


def added_tokens(where: str) -> dict[str, int]:
    """Return the added tokens of the tokenizer in a folder or of a hub id, with their ids."""
    file = Path(where) / "tokenizer.json"
    if file.is_file():
        return {token["content"]: token["id"] for token in read_settings(file).get("added_tokens") or ()}
    if Path(where).is_dir():
        return {}
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(where, trust_remote_code=remote.trusts(where)).get_added_vocab()
