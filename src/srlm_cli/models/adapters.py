"""Adapters of peft: which ones can be taken, what they are trained on, and that every tensor of one finds its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError
from srlm_cli.models.files import read_settings
from srlm_cli.models.weights import refuse_unlike, report_renamed, saver_prefix, some, unwrapped

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

SETTINGS = "adapter_config.json"
INSIDE = "base_model.model."  # where the names of a base are in the names of an adapter
NAME = "default"
WRAPPED = {"base_layer", "original_module", "modules_to_save", NAME}  # parts of names of what an adapter wraps


def base_of(folder: str) -> str:
    """Return the model that an adapter was trained on, as the adapter names it."""
    base = read_settings(Path(folder) / SETTINGS).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise EngineError(
            f"cannot load the model {folder}: {SETTINGS} names no base model",
            "write the model that it was trained on into base_model_name_or_path",
        )
    return base


def settings_of(folder: str) -> PeftConfig:
    """Return the settings of an adapter that can become part of a causal LM; raise EngineError for any other."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = PeftConfig.from_pretrained(folder)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        raise EngineError(f"{folder} is an adapter of kind {kind}", "srlm takes those that can be merged, as LoRA can")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise EngineError(f"{folder} is an adapter for {config.task_type}, not for text (CAUSAL_LM)")
    if getattr(config, "alora_invocation_tokens", None):
        raise EngineError(f"{folder} is an adapter that works only after tokens that call it (aLoRA)")
    return config


def in_order(file: Path) -> bytes:
    """Return the settings of an adapter as bytes that equal settings have in common: peft writes sets in any order."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lists = {name: sorted(value) for name, value in found.items() if isinstance(value, list)}
    except (OSError, ValueError, AttributeError, TypeError):
        return file.read_bytes()
    return json.dumps({**found, **lists}, sort_keys=True).encode()


def sort_settings(net: PeftModel) -> None:
    """Let peft write the settings of an adapter as equal bytes each time: of a set it writes the order of hashes."""
    config = net.peft_config[NAME]
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def attach(base: PreTrainedModel, folder: str, source: str, *, trainable: bool) -> PeftModel:
    """Return a model with an adapter on it, whose tables of tokens fit those that the adapter was trained with.

    `source` is where the base was loaded from.
    """
    from peft import get_peft_model

    config = settings_of(folder)
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    config.inference_mode = not trainable
    tensors = read(folder)
    whole_tables = fit_embeddings(base, folder, config, tensors)
    check_tokens(folder, source, len(base.get_input_embeddings().weight))
    net = get_peft_model(base, config)
    config.base_model_name_or_path = name
    net.saves_embeddings = whole_tables
    if not trainable:
        net.eval()
    fill(net, folder, tensors)
    return net


def restore(net: PeftModel, folder: str) -> None:
    """Give an adapter in training the weights of a checkpoint."""
    fill(net, folder, read(folder))


def read(folder: str) -> dict[str, Any]:
    """Return the tensors of an adapter's file by name."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

    if not any((Path(folder) / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise EngineError(f"cannot load the model {folder}: {SAFETENSORS_WEIGHTS_NAME} is not there")
    return load_peft_weights(folder, device="cpu")


def fill(net: PeftModel, folder: str, tensors: dict[str, Any]) -> None:
    """Put each tensor of an adapter's file in its place; raise EngineError where names or shapes do not match."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(net, save_embedding_layers=False)
    tensors = as_peft_saves(folder, tensors, set(own))
    what = f"cannot load the model {folder}"
    hint = f"it was made on another model than {net.peft_config[NAME].base_model_name_or_path}, or is not complete"
    pairs = ((name, tensor.shape, own[name].shape) for name, tensor in tensors.items() if name in own)
    refuse_unlike(what, (), (), [pair for pair in pairs if pair[1] != pair[2]], len(own), hint)
    lacking = own.keys() - tensors.keys()
    try:
        found = set_peft_model_state_dict(net, tensors, adapter_name=NAME)
    except KeyError:  # a module that is trained whole
        refuse_unlike(what, lacking, (), (), len(own), hint)
        raise
    # An older file of a mixture of experts lacks names that peft makes of others: then it finds all of its own.
    empty = any(NAME in name.split(".") for name in found.missing_keys)
    refuse_unlike(what, lacking if empty else (), found.unexpected_keys, (), len(own), hint)


def as_peft_saves(folder: str, tensors: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """Return tensors under the names that peft saves them by (`own`), whatever another saver made of these."""
    if own <= tensors.keys():  # peft writes a table that is trained whole a second time where it has grown
        more = {name: bare(name) for name in tensors.keys() - own}
        twice = {name for name, once in more.items() if once in own and tensors[name].equal(tensors[once])}
        return {name: tensor for name, tensor in tensors.items() if name not in twice}
    plain = {name: bare(name, {NAME}) for name in tensors}
    wanted = {name.removeprefix(INSIDE) for name in own}
    prefix = saver_prefix(plain.values(), wanted)
    if prefix or wanted <= set(plain.values()):
        plain = {name: INSIDE + new.removeprefix(prefix) for name, new in plain.items()}
    if changed := {name: new for name, new in plain.items() if name != new}:
        report_renamed(folder, changed)
    return {plain[name]: tensor for name, tensor in tensors.items()}


def bare(name: str, wrapped: set[str] = WRAPPED) -> str:
    """Return the name of a tensor without what savers and peft itself have wrapped it in."""
    return ".".join(part for part in unwrapped(name).split(".") if part not in wrapped)


# --- tokens that an adapter brings -----------------------------------------------------------


def fit_embeddings(base: PreTrainedModel, folder: str, config: PeftConfig, tensors: dict[str, Any]) -> bool:
    """Give a base as many tokens as an adapter was trained with; tell whether its file has whole tables of them.

    Raises EngineError where new tokens would have random numbers, in the input table or in the output table.
    """
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    tables = [name for name, module in base.named_modules() if module in ends]
    saved = {name: found for name in tables if (found := saved_rows(name, tensors))}
    trained = trained_tokens(config)
    rows = len(ends[0].weight)
    wanted = max(saved.values()) if saved else max([rows, *(token + 1 for token in trained)])
    if wanted != rows:
        base.resize_token_embeddings(wanted, mean_resizing=False)
    apart = {name for name in saved if name.rsplit(".", 1)[-1] in (config.modules_to_save or ())}
    tied = base.get_input_embeddings().weight is getattr(base.get_output_embeddings(), "weight", None)
    shared = tied and (saved.keys() - apart or getattr(config, "ensure_weight_tying", False))
    by_index = set(range(rows, wanted)) <= trained
    lost = [name for at, name in enumerate(tables) if not (name in saved or shared or by_index and (at == 0 or tied))]
    if wanted > rows and lost:
        raise EngineError(
            f"cannot load the model {folder}: its base lacks {wanted - rows} of its tokens, and {lost[0]} has no rows "
            "for them in it",
            "save it with the embeddings: save_embedding_layers=True, or modules_to_save with both tables",
        )
    return bool(saved.keys() - apart)


def saved_rows(table: str, tensors: dict[str, Any]) -> int:
    """Return how many rows of a table of tokens a file of an adapter has, 0 where it has none."""
    for name, tensor in tensors.items():
        if f".{bare(name)}".endswith(f".{table}.weight"):
            return len(tensor)
    return 0


def trained_tokens(config: PeftConfig) -> set[int]:
    """Return the tokens whose rows an adapter has trained one by one."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    return {token for some in (found.values() if isinstance(found, dict) else [found]) for token in some}


def check_tokens(folder: str, base: str, rows: int) -> None:
    """Raise EngineError where the tokenizer of an adapter has added tokens that no row of the embeddings is for."""
    new = added_tokens(folder)
    if max(new.values(), default=0) < rows:
        return
    known = added_tokens(base)  # some models have tokens without a row, for their pictures
    lost = sorted(token for token, at in new.items() if at >= rows and token not in known)
    if lost:
        raise EngineError(
            f"cannot load the model {folder}: its tokenizer has {len(lost)} tokens ({some(lost)}) "
            f"for which neither it nor its base {base} has embeddings",
            "save the adapter with its embeddings, or use the tokenizer of the base",
        )


def added_tokens(folder: str) -> dict[str, int]:
    """Return the tokens that were added to the tokenizer of a folder, with their numbers."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return {}
    return {token["content"]: token["id"] for token in read_settings(file).get("added_tokens") or ()}
