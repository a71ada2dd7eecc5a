"""What SFT and DPO share: settings, the model to train, a training that can go on, and the folder it makes."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import distributed, models
from srlm_cli.errors import DataError, OptionError
from srlm_cli.records import Row
from srlm_cli.streams.console import say
from srlm_cli.streams.writer import dumps
from srlm_cli.train import dropout
from srlm_cli.train.callback import follower
from srlm_cli.train.workdir import METRICS, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

PROVENANCE = "provenance.json"

# Settings that decide how a training runs, but not what it makes: an unfinished one goes on under others.
OPERATIONAL = {"out", "together", "device", "checkpointing"}


@dataclass(frozen=True)
class TrainSpec:
    """How to train: `batch` sequences (or pairs) a step, `together` of them at a time on the device.

    `together` 0 is as many on a CPU as a pass is quickest with (`packing`), and 4 elsewhere. The
    learning rate falls by a cosine from `learning_rate` to `final_learning_rate`. `lora_r` 0 is full
    fine-tuning; an adapter folder as the model goes on being trained as that adapter; `merge` writes
    the adapter into the weights at the end, and `load_in_4bit` trains it on weights of 4 bits (QLoRA).
    `dtype` is that of a step's products: float32, bfloat16 (autocast), or auto, which `take` settles.
    """

    model: str
    out: Path
    learning_rate: float
    final_learning_rate: float
    batch: int = 16
    together: int = 0
    epochs: float = 1.0
    max_steps: int = -1
    max_length: int = 2048
    warmup_steps: int = 0
    weight_decay: float = 0.0
    dropout: float = 0.0
    lora_r: int = 0
    lora_alpha: int = 0
    merge: bool = False
    load_in_4bit: bool = False
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class RunOptions:
    """How a training is run; of these only `keep_duplicates` changes what it makes.

    `save_steps` 0 saves every ten minutes.
    """

    quiet: bool = False
    restart: bool = False
    on_stale: str = "stop"
    dry_run: bool = False
    save_steps: int = 0
    keep_checkpoints: bool = False
    report_to: str = "none"
    keep_duplicates: bool = False


def load_tokenizer(spec: TrainSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to train."""
    models.locate(spec.model)  # a wrong path is told before anything is loaded
    from datasets import disable_progress_bars

    models.quiet_libraries()
    disable_progress_bars()
    tokenizer = models.load_tokenizer(spec.model)
    tokenizer.padding_side = "right"
    return tokenizer


def within_context(spec: TrainSpec, name: str, quiet: bool) -> TrainSpec:
    """Return a spec whose rows are no longer than the model can read."""
    context = models.context_of(spec.model)
    if context is None or spec.max_length <= context:
        return spec
    if not quiet:
        say(f"srlm {name}: --max-length is {context}, all that {spec.model} can read")
    return replace(spec, max_length=context)


def usable(held: list[Row], given: list[Row] | None, spec: TrainSpec) -> list[Row]:
    """Return the rendered held-out rows; raise DataError where rows were given and none is left."""
    if given is not None and not held:
        raise DataError(f"--eval-in has no row that fits into --max-length {spec.max_length}, of {len(given)}")
    return held


def load_policy(spec: TrainSpec) -> PreTrainedModel:
    """Return the model to train, in float32; the base of an adapter may be in 4 bits.

    The weights are float32 since a step moves them by less than bfloat16 can hold; the products of
    a step are of the dtype of the spec.
    """
    from transformers import set_seed

    keep_freed_memory()
    set_seed(spec.seed)  # a new adapter begins with random numbers
    if spec.load_in_4bit and (spec.merge or not (spec.lora_r or models.is_adapter(models.locate(spec.model)))):
        raise OptionError(
            "--load-in-4bit trains an adapter on weights that stay as they are", "--lora-r 16, no --merge"
        )
    in_4bit = training_dtype(spec) if spec.load_in_4bit else None
    model = models.load_model(spec.model, "float32", loading_device(spec), merge=False, in_4bit=in_4bit)
    if spec.lora_r and not hasattr(model, "peft_config"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=spec.lora_r,
            lora_alpha=spec.lora_alpha or 2 * spec.lora_r,
            lora_dropout=spec.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        # peft notes where the base was loaded from; its name finds it again on another machine too.
        model.peft_config["default"].base_model_name_or_path = spec.model
    elif spec.lora_r and model.peft_config["default"].r != spec.lora_r:
        raise OptionError(
            f"{spec.model} is an adapter of rank {model.peft_config['default'].r}, and --lora-r is {spec.lora_r}",
            "leave --lora-r out: the adapter itself goes on being trained",
        )
    if spec.load_in_4bit:  # where TRL sees it, it rounds the adapter to bfloat16, which small steps do not move
        model.get_base_model().is_loaded_in_4bit = False
    dropout.set_share(model, spec.dropout)
    model.config.use_cache = False
    return model


def training_dtype(spec: TrainSpec) -> str:
    """Return the dtype of a step's products, that of the device for `auto`."""
    return models.pick_training_dtype(spec.dtype, models.pick_device(spec.device))


def loading_device(spec: TrainSpec) -> str:
    """Return where a model is loaded; of several processes each has a device of its own, which the trainer knows."""
    device = models.pick_device(spec.device)
    if spec.load_in_4bit and distributed.started():  # weights in 4 bits stay where they are made
        return distributed.own_device(device)
    return "cpu" if distributed.started() else device


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: a CPU training step otherwise loses much time to page faults."""
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**31 - 1)):
            libc.mallopt(parameter, value)
    except (AttributeError, OSError):  # not glibc
        pass


def together(spec: TrainSpec) -> int:
    """Return how many sequences (or pairs) are on a device at a time."""
    share = max(1, spec.batch // distributed.count())
    if spec.together or models.pick_device(spec.device) != "cpu":
        return spec.together or max(count for count in range(1, min(4, share) + 1) if share % count == 0)
    if distributed.count() > 1:
        return 1
    return spec.batch  # which `StepTrainer.training_step` takes apart again


def trainer_settings(spec: TrainSpec, run: RunOptions, folder: Path) -> dict[str, Any]:
    """Return the settings of a spec as `transformers.TrainingArguments` takes them.

    What is saved, and when, is the follower's business: see `follow`.
    """
    if spec.merge and distributed.sharded():
        raise OptionError("--merge needs the whole weights in one process", "an adapter folder goes to every command")
    if spec.load_in_4bit and distributed.sharded():
        raise OptionError("--load-in-4bit keeps all weights in each process", "a profile without FSDP and ZeRO 3")
    device, at_a_time, count = models.pick_device(spec.device), together(spec), distributed.count()
    if spec.batch % (at_a_time * count):
        shared = f" x {count} processes" if count > 1 else ""
        raise OptionError(f"--train-batch-size {spec.batch} is no multiple of --device-batch-size {at_a_time}{shared}")
    return {
        "output_dir": str(folder),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": spec.final_learning_rate},
        "per_device_train_batch_size": at_a_time,
        "per_device_eval_batch_size": at_a_time,
        "gradient_accumulation_steps": spec.batch // (at_a_time * count),
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
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


# --- a training that can go on ---------------------------------------------------------------


def fingerprint(command: str, spec: TrainSpec, rows: list[Row], **more: Any) -> dict[str, Any]:
    """Return all but the dtype that decides what a training makes: an unfinished one continues only under the same."""
    from srlm_cli import __version__

    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(dumps(row).encode("utf-8", "surrogatepass") + b"\n")
    settings = {key: value for key, value in asdict(spec).items() if key not in {*OPERATIONAL, "dtype"}}
    about = {"command": command, "srlm": __version__, "rows": digest.hexdigest()}
    return {**about, "model_fingerprint": models.fingerprint(spec.model), **settings, **more}


def take(part: Part, name: str, identity: dict[str, Any], spec: TrainSpec, run: RunOptions) -> TrainSpec:
    """Take the folder for a training of this identity; return the spec with its dtype settled.

    `auto` is the dtype that an unfinished run of this identity began with, perhaps on another processor, else the
    device's.
    """
    dtype = training_dtype(spec)
    begun = None if run.restart or spec.dtype != "auto" else part.begun_with(identity).get("dtype")
    if begun and begun != dtype and not run.quiet:
        say(f"srlm {name}: training in {begun}, as the unfinished run began; --dtype auto is {dtype} on this machine")
    spec = replace(spec, dtype=begun or dtype)
    # accelerate trains in what stands here, also by a profile of another dtype.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if spec.dtype == "bfloat16" else "no"
    part.take({**identity, "dtype": spec.dtype}, run.restart, run.on_stale, run.keep_checkpoints)
    return spec


def run_training(trainer: Trainer, part: Part, name: str, run: RunOptions) -> dict[str, Any]:
    """Train to the end, from the last checkpoint where there is one; return the figures of the whole training."""
    from transformers import PrinterCallback

    steps = part.logged()
    chooses = trainer.eval_dataset is not None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(follow := follower(part, name, run, chooses))
    if part.checkpoint and not run.quiet:
        say(f"srlm {name}: going on from step {part.checkpoint}, saved in {part.folder}")
    started = time.monotonic()
    before = state_of(part)
    if before and before.global_step >= before.max_steps:  # a training that was killed behind its last step
        trainer.state = before
    else:
        try:
            trainer.train(resume_from_checkpoint=str(part.step(part.checkpoint)) if before else None)
        finally:
            follow.close()
    state = trainer.state
    if chooses:
        load_checkpoint(trainer, str(part.step(part.best)))
    seconds = time.monotonic() - started
    tokens = state.num_input_tokens_seen - (before.num_input_tokens_seen if before else 0)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "dtype": "bfloat16" if trainer.args.bf16 else "float32",
        "steps": state.global_step,
        **({"resumed_from": steps[-1]["step"]} if steps else {}),
        **({"chosen_step": part.best, "evals": evals(state.log_history)} if chooses else {}),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def load_checkpoint(trainer: Trainer, folder: str) -> None:
    """Give the trainer's model the weights of a checkpoint, of which each process may hold a part."""
    if distributed.sharded():
        trainer.state.best_model_checkpoint = folder
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(folder)


def state_of(part: Part) -> Any:
    """Return transformers' state of the last checkpoint, or None before the first."""
    from transformers import TrainerState

    return (
        TrainerState.load_from_json(str(part.step(part.checkpoint) / "trainer_state.json")) if part.checkpoint else None
    )


def evals(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the figures on held-out rows by step: loss and, of pairs, accuracy."""
    kept = {"step": "step", "eval_loss": "loss", "eval_rewards/accuracies": "accuracy"}
    found = [entry for entry in history if "eval_loss" in entry]
    return [{name: entry[key] for key, name in kept.items() if key in entry} for entry in found]


# --- the folder ------------------------------------------------------------------------------


def save(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    spec: TrainSpec,
    provenance: dict[str, Any],
) -> None:
    """Write model, tokenizer and chat template, the provenance file last; then let the folder appear as OUT."""
    whole = None if not distributed.sharded() else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not distributed.is_main():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    tokenizer.padding_side = "left"
    with part.writing("the model"):
        shutil.rmtree(part.model, ignore_errors=True)
        if not hasattr(model, "peft_config"):
            model.save_pretrained(part.model, state_dict=whole)
        elif spec.merge:
            model.merge_and_unload().save_pretrained(part.model)
        else:
            model.save_pretrained(
                part.model, selected_adapters=["default"], save_embedding_layers=False, state_dict=whole
            )
        tokenizer.save_pretrained(part.model)
        shutil.copyfile(part.metrics, part.model / METRICS)
        settings = {**asdict(spec), "out": str(spec.out)}
        with open(part.model / PROVENANCE, "w", encoding="utf-8") as file:
            json.dump({**provenance, "settings": settings}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.publish()
