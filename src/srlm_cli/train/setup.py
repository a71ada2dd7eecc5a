"""The setup of a training: tokenizer, policy, and the settings of the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import distributed, threads
from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.errors import DataError, EngineError, OptionError
from srlm_cli.models import adapters
from srlm_cli.models.collection import without_collection
from srlm_cli.models.hardware import pick_device, pick_training_dtype
from srlm_cli.models.load import (
    base_tokenizer,
    context_of,
    end_of_turn_ids,
    load_model,
    load_tokenizer,
    quiet_libraries,
)
from srlm_cli.models.locate import is_adapter, locate
from srlm_cli.records import Record
from srlm_cli.streams.console import say
from srlm_cli.train import dropout, optimizers, router
from srlm_cli.train.clone_template import clone_template, extend_model
from srlm_cli.train.heap import keep_freed_memory
from srlm_cli.train.lora import add_adapter
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@without_collection()
def open_tokenizer(spec: TrainSpec, quiet: bool = True) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to train, with the chat template of the spec."""
    locate(spec.model)  # before anything is loaded: it reports a wrong path immediately
    from datasets import disable_progress_bars

    quiet_libraries()
    disable_progress_bars()
    tokenizer = cloned(spec, quiet) if spec.chat_template else load_tokenizer(spec.model)
    if tokenizer.eos_token is None:
        raise EngineError(
            f"{spec.model} has no end-of-turn token",
            "set eos_token in tokenizer_config.json or eos_token_id in generation_config.json",
        )
    tokenizer.padding_side = "right"
    return tokenizer


def cloned(spec: TrainSpec, quiet: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a full model with the chat template of a spec, and say what is new in it."""
    if is_adapter(locate(spec.model)):
        raise OptionError(
            f"--chat-template needs a full model, and {spec.model} is an adapter", "train its base, or --merge it first"
        )
    tokenizer = base_tokenizer(spec.model)
    replaced, before = bool(tokenizer.chat_template), len(tokenizer)
    clone_template(tokenizer, spec.chat_template or "")
    if not quiet:
        replaces = f", in place of that of {spec.model}" if replaced else ""
        say(
            f"srlm sft: chat template {spec.chat_template}{replaces}: {len(tokenizer) - before} tokens added, "
            f"{tokenizer.eos_token} ends a turn"
        )
    return tokenizer


def renderer(tokenizer: PreTrainedTokenizerBase, spec: TrainSpec) -> Renderer:
    """Return what renders the rows of a training; raise OptionError for an option that the chat template ignores."""
    engine = EngineSpec(
        model=spec.model,
        today=spec.today or None,
        thinking=spec.thinking,
        template_kwargs=spec.template_kwargs,
        think_markers=spec.think_markers,
    )
    stops = end_of_turn_ids(spec.model)
    return Renderer(tokenizer, ChatTemplate.of(tokenizer, engine), stops, spec.train_thoughts)


def within_context(spec: TrainSpec, name: str, quiet: bool) -> TrainSpec:
    """Return a spec whose rows are no longer than the model can read."""
    context = context_of(spec.model)
    if context is None or spec.max_length <= context:
        return spec
    if not quiet:
        say(f"srlm {name}: --max-length is {context}, the context length of {spec.model}")
    return replace(spec, max_length=context)


def usable(rendered: list[Record], given: list[Record] | None, spec: TrainSpec) -> list[Record]:
    """Return the rendered held-out rows; raise DataError where rows were given and none is left."""
    if given is not None and not rendered:
        raise DataError(f"--eval-file has no row within --max-length {spec.max_length}, of {len(given)}")
    return rendered


def load_policy(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model to train, in float32, with an embedding for each token; the base of an adapter may be in 4 bits.

    The weights are float32 since a step moves them by less than bfloat16 can hold; the products of
    a step are of the dtype of the spec.
    """
    from transformers import set_seed

    if (spec.lora_target or spec.lora_target_parameters) and not spec.lora_r:
        raise OptionError("--lora-target and --lora-target-parameters need --lora-r", "--lora-r 16")
    optimizers.check(spec.optim)
    keep_freed_memory()
    set_seed(spec.seed)  # a new adapter begins with random numbers
    if spec.load_in_4bit and (spec.merge or not (spec.lora_r or is_adapter(locate(spec.model)))):
        raise OptionError(
            "--load-in-4bit trains an adapter on weights that stay as they are", "--lora-r 16, no --merge"
        )
    in_4bit = training_dtype(spec) if spec.load_in_4bit else None
    model = load_model(
        spec.model, "float32", loading_device(spec), merge=False, in_4bit=in_4bit, attention=spec.attn_implementation
    )
    getattr(model, "get_base_model", lambda: model)().own_attention = bool(spec.attn_implementation)
    tokens = extend_model(model, tokenizer, spec) if spec.chat_template else []
    if spec.lora_r and not hasattr(model, "peft_config"):
        model = add_adapter(model, spec, tokens)
    elif spec.lora_r and model.peft_config["default"].r != spec.lora_r:
        raise OptionError(
            f"{spec.model} is an adapter of rank {model.peft_config['default'].r}, and --lora-r is {spec.lora_r}",
            "omit --lora-r: the adapter itself is trained further",
        )
    elif spec.lora_target or spec.lora_target_parameters:
        raise OptionError(f"{spec.model} is an adapter: its layers are set", "omit --lora-target")
    if hasattr(model, "peft_config"):
        adapters.sort_settings(model)
    if spec.load_in_4bit:  # where TRL sees it, it rounds the adapter to bfloat16, which small steps do not move
        model.get_base_model().is_loaded_in_4bit = False
    dropout.set_share(model, spec.dropout)
    router.disable_noise(model)
    model.config.use_cache = False
    own_weights(model)
    return model


def own_weights(model: PreTrainedModel) -> None:
    """Copy the weights that a training changes into memory of this process.

    They are pages of the model's file, and the first step of an optimizer would copy each where it writes to it, which
    takes ten times as long: the other threads wait until the processor has forgotten where the page was.
    """
    with threads.few(0):
        for weight in model.parameters():
            if weight.requires_grad and weight.device.type == "cpu":
                weight.data = weight.data.clone()


def training_dtype(spec: TrainSpec) -> str:
    """Return the dtype of a step's products, that of the device for `auto`."""
    return pick_training_dtype(spec.dtype, pick_device(spec.device))


def loading_device(spec: TrainSpec) -> str:
    """Return where a model is loaded; of several processes each has a device of its own, which the trainer knows."""
    device = pick_device(spec.device)
    if spec.load_in_4bit and distributed.started():  # weights in 4 bits stay where they are made
        return distributed.own_device(device)
    return "cpu" if distributed.started() else device


def device_batch_size(spec: TrainSpec) -> int:
    """Return how many sequences (or pairs) are on a device at a time."""
    share = max(1, spec.batch // distributed.count())
    if spec.device_batch_size or pick_device(spec.device) != "cpu":
        return spec.device_batch_size or max(count for count in range(1, min(4, share) + 1) if share % count == 0)
    if distributed.count() > 1:
        return 1
    return spec.batch  # which `StepTrainer.training_step` takes apart again


def trainer_settings(spec: TrainSpec, run: RunOptions, folder: Path) -> dict[str, Any]:
    """Return the settings of a spec as `transformers.TrainingArguments` takes them.

    The callback decides what is saved, and when (see `callback.follower`).
    """
    if spec.merge and distributed.sharded():
        raise OptionError("--merge needs the whole weights in one process", "an adapter folder goes to every command")
    if spec.load_in_4bit and distributed.sharded():
        raise OptionError("--load-in-4bit keeps all weights in each process", "a profile without FSDP and ZeRO 3")
    device, at_a_time, count = pick_device(spec.device), device_batch_size(spec), distributed.count()
    if spec.batch % (at_a_time * count):
        shared = f" x {count} processes" if count > 1 else ""
        raise OptionError(
            f"--train-batch-size {spec.batch} is not a multiple of --device-batch-size {at_a_time}{shared}"
        )
    return {
        "output_dir": str(folder),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": spec.final_learning_rate / (spec.learning_rate or 1.0)},
        "per_device_train_batch_size": at_a_time,
        "per_device_eval_batch_size": at_a_time,
        "gradient_accumulation_steps": spec.batch // (at_a_time * count),
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "optim": optimizers.check(spec.optim),
        "gradient_checkpointing": spec.checkpointing,  # the name before transformers 5.20, too
        "max_length": spec.max_length,
        "use_cpu": device == "cpu",
        "bf16": training_dtype(spec) == "bfloat16",
        "seed": spec.seed,
        "data_seed": spec.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would show a NaN loss as the mean of those before
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",
        "prediction_loss_only": True,
        "report_to": trackers(run.report_to),
        "disable_tqdm": True,
        "log_level_replica": "error",
        "dataloader_pin_memory": device.startswith("cuda"),
    }


def trackers(names: str) -> list[str]:
    """Return the trackers of a comma-separated list, as transformers takes them; raise OptionError for one not here."""
    from transformers.integrations import get_available_reporting_integrations as installed
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    asked = [name.strip() for name in names.split(",")]
    if asked in (["none"], ["all"]):
        return asked
    here = installed()
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(f"--report-to {name}: no such tracker", f"one of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in here:
            raise OptionError(f"--report-to {name}: it is not installed", f"pip install {name}")
    return asked


def on_one_gpu(config: TrainingArguments) -> TrainingArguments:
    """Let one process use one GPU of several: TRL's trainers refuse the DataParallel of transformers."""
    if config.n_gpu > 1:
        config._n_gpu = 1
    return config
