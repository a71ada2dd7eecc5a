"""Load a model or its tokenizer, in the dtype and on the device that was asked for."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import threads
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models import adapters, files, remote, weights
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load_errors import in_one_line
from srlm_cli.models.locate import adapter_base, is_adapter, locate, lowest_base
from srlm_cli.records import PROVENANCE

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def quiet_libraries() -> None:
    """Leave the screen to our own progress: no load bars, no advice, no warnings for the makers of libraries.

    Nor does a library report home: TRL would send a line on each trainer that is made.
    """
    import logging as plain_logging
    import warnings

    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    hub_logging.set_verbosity_error()
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's bar over the reference model asks only for this
    warnings.filterwarnings("ignore", category=FutureWarning)
    plain_logging.getLogger("bitsandbytes").setLevel(plain_logging.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def base_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model as it is, perhaps without a chat template, EOS or pad token."""
    from srlm_cli.models.light_transformers import AutoTokenizer

    folder = locate(model)
    if is_adapter(folder) and not (Path(folder) / "tokenizer_config.json").is_file():
        return base_tokenizer(adapter_base(folder))  # peft alone saves none beside an adapter
    _check_settings(model, folder)
    own = {"trust_remote_code": remote.trusts(folder)}
    return in_one_line(model, folder, lambda: AutoTokenizer.from_pretrained(folder, **own))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token; refuse one without a chat template."""
    tokenizer = base_tokenizer(model)
    if not tokenizer.chat_template:
        raise EngineError(
            f"{model} has no chat template",
            "train a base model with `srlm sft --chat-template chatml`, or use an instruct model",
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _configured_end(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _configured_end(model: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the end-of-turn token from the settings of a model; if there are several, the one in its chat template."""
    ends = [end for end in tokenizer.convert_ids_to_tokens(end_of_turn_ids(model)) if end is not None]
    return next((end for end in ends if end in tokenizer.chat_template), ends[0] if ends else None)


def end_of_turn_ids(model: str) -> list[int]:
    """Return the tokens that end a turn by the generation settings of a model, or else by its configuration."""
    from srlm_cli.models.light_transformers import GenerationConfig

    where = lowest_base(model)
    ids = None
    try:
        ids = GenerationConfig.from_pretrained(where).eos_token_id
    except OSError:  # no such file
        pass
    if ids is None:
        ids = load_config(model).get_text_config().eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def load_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a model, that of its base for an adapter."""
    from srlm_cli.models.light_transformers import AutoConfig

    where = lowest_base(model)
    own = {"trust_remote_code": remote.trusts(where)}
    return in_one_line(model, where, lambda: AutoConfig.from_pretrained(where, **own))


def sampling_of(model: str) -> dict[str, float]:
    """Return what the generation settings of a model say of sampling, by the names of our options."""
    from srlm_cli.models.light_transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(lowest_base(model)).to_diff_dict()
    except OSError:  # no such file
        return {}
    return {name: found[name] for name in SAMPLING if found.get(name) is not None}


def context_of(model: str) -> int | None:
    """Return how many tokens a model reads at most, None where its configuration does not say."""
    return getattr(load_config(model).get_text_config(), "max_position_embeddings", None)


def shapes_of(model: str, embeddings: bool = True) -> list[tuple[int, ...]]:
    """Return the shapes of the weights of a model, of its base for an adapter; only the configuration is read.

    Raises EngineError if no model can be made of the configuration. An adapter can resize `embeddings`.
    """
    import torch

    from srlm_cli.models.light_transformers import AutoModelForCausalLM

    where, config = lowest_base(model), load_config(model)

    def make() -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=remote.trusts(where))

    net = in_one_line(model, where, make)
    left_out = [] if embeddings else [net.get_input_embeddings(), net.get_output_embeddings()]
    apart = {id(weight) for layer in left_out if layer is not None for weight in layer.parameters()}
    return [tuple(weight.shape) for weight in net.parameters() if id(weight) not in apart]


def load_model(
    model: str,
    dtype: str,
    device: str = "cpu",
    *,
    merge: bool = True,
    in_4bit: str | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Return a causal LM on a device, with its adapter merged into the weights unless `merge` is False.

    `in_4bit` is the compute dtype of base weights that are stored in 4 bits (NF4, arXiv 2305.14314). `attention` is an
    attention implementation of transformers.
    """
    import torch

    from srlm_cli.models.meta_device import load_lightly

    folder = locate(model)
    adapter = is_adapter(folder)
    source = adapter_base(folder) if adapter else folder
    where = locate(source) if adapter else folder
    if adapter:
        in_one_line(model, folder, lambda: adapters.config_of(folder))  # before the base is loaded
        _check_base(folder, source)
    if is_adapter(where):  # an adapter on an adapter: the lower one becomes part of the weights
        if in_4bit:
            raise OptionError(
                f"--load-in-4bit cannot load an adapter whose base is an adapter: {source}", "merge that one first"
            )
        loaded = load_model(source, dtype, device, attention=attention)
    else:
        packed = four_bits(in_4bit, device) if in_4bit else {}
        packed |= remote.check_attention(attention, remote.trusts(where))
        whole = f"{source} (the base of {model})" if adapter else source
        _check_settings(whole, where)
        make = partial(weights.load_whole, whole, where, dtype=getattr(torch, dtype), **packed)
        with threads.few(0):  # transformers loads several weights at a time, each in its own thread
            loaded = in_one_line(whole, where, make if in_4bit else lambda: load_lightly(make))
    if adapter:
        loaded = in_one_line(model, folder, lambda: adapters.load_adapter(loaded, folder, where, trainable=not merge))
        if merge:
            loaded = in_one_line(model, folder, loaded.merge_and_unload)
    if device == "cpu":
        threads.share_cores(loaded)
    if not in_4bit:
        return loaded.to(device)
    # Weights that bitsandbytes packs in evaluation on such CPUs have no gradient in training afterwards.
    for layer in loaded.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return loaded


def _check_settings(model: str, where: str) -> None:
    """Raise EngineError if a settings file in a model folder is broken."""
    if Path(where).is_dir() and (fault := files.broken_file(Path(where), files.SETTINGS)):
        raise EngineError(f"cannot load the model {model}: {fault}")


def _check_base(folder: str, base: str) -> None:
    """Raise EngineError if the base weights have changed since `srlm` trained an adapter on them."""
    about = Path(folder) / PROVENANCE
    trained = files.read_settings(about).get("base") if about.is_file() else None
    if trained and trained["fingerprint"] != fingerprint(base, weights_only=True):
        raise EngineError(
            f"cannot load the model {folder}: the weights of its base {base} have changed since it was trained",
            "restore the base, or train the adapter again",
        )


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model; raise EngineError if a tensor is missing or does not fit.

    transformers' Trainer skips tensors whose names differ between file and memory, such as experts
    (findings/trainer-resumes-a-mixture-without-its-experts.sh).
    """
    name = str(folder)
    if hasattr(model, "peft_config"):
        in_one_line(name, name, lambda: adapters.load_tensors(model, name, adapters.read_tensors(name)))
    else:
        saved = in_one_line(name, name, lambda: weights.load_whole(name, name, dtype=model.dtype))
        model.load_state_dict(saved.state_dict())


def four_bits(dtype: str, device: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load weights in 4 bits that multiply in `dtype`.

    Raises OptionError where bitsandbytes or the device has none.
    """
    if not find_spec("bitsandbytes"):
        raise OptionError("--load-in-4bit needs bitsandbytes", "pip install bitsandbytes")
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig

    if device.split(":")[0] not in bitsandbytes.supported_torch_devices:
        raise OptionError(
            f"bitsandbytes {bitsandbytes.__version__} does not support 4-bit weights on {device}",
            "use another --device",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}
