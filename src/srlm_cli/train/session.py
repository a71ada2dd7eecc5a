"""What SFT and DPO share: settings, the model to train, progress, and a folder that appears when whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli import models
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.streams.console import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

PROVENANCE = "provenance.json"
METRICS = "metrics.jsonl"

# What is kept of each logged step, by our names: rewards are beta x log-ratios, as TRL gives them.
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
}


@dataclass(frozen=True)
class TrainSpec:
    """How to train: `batch` sequences (or pairs) a step, `together` of them at a time on the device.

    The learning rate falls by a cosine from `learning_rate` to `final_learning_rate`. `lora_r` 0 is
    full fine-tuning; an adapter folder as the model goes on being trained as that adapter.
    """

    model: str
    out: Path
    learning_rate: float
    final_learning_rate: float
    batch: int
    together: int
    epochs: float
    max_steps: int
    max_length: int
    warmup_steps: int
    lora_r: int
    lora_alpha: int
    device: str
    seed: int
    checkpointing: bool = False


def load_tokenizer(spec: TrainSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to train."""
    models.locate(spec.model)  # a wrong path is told before anything is loaded
    from datasets import disable_progress_bars

    models.quiet_libraries()
    disable_progress_bars()
    tokenizer = models.load_tokenizer(spec.model)
    tokenizer.padding_side = "right"
    return tokenizer


def load_policy(spec: TrainSpec) -> PreTrainedModel:
    """Return the model to train, in float32.

    The weights are float32 since a step moves them by less than bfloat16 can hold; the products of
    a step run in bfloat16 where the device is fast in it.
    """
    keep_freed_memory()
    device = models.pick_device(spec.device)
    model = models.load_model(spec.model, "float32", device, merge=False)
    if spec.lora_r and not hasattr(model, "peft_config"):
        from peft import LoraConfig, get_peft_model

        alpha = spec.lora_alpha or 2 * spec.lora_r
        config = LoraConfig(r=spec.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        # peft notes where the base was loaded from; its name finds it again on another machine too.
        model.peft_config["default"].base_model_name_or_path = spec.model
    elif spec.lora_r and model.peft_config["default"].r != spec.lora_r:
        raise OptionError(
            f"{spec.model} is an adapter of rank {model.peft_config['default'].r}, and --lora-r is {spec.lora_r}",
            "leave --lora-r out: the adapter itself goes on being trained",
        )
    model.config.use_cache = False
    return model


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


def trainer_settings(spec: TrainSpec) -> dict[str, Any]:
    """Return the settings of a spec as `transformers.TrainingArguments` takes them."""
    device = models.pick_device(spec.device)
    if spec.batch % spec.together:
        raise OptionError(f"--train-batch-size {spec.batch} is no multiple of --device-batch-size {spec.together}")
    return {
        "output_dir": str(part_of(spec.out) / "trainer"),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": spec.final_learning_rate},
        "per_device_train_batch_size": spec.together,
        "gradient_accumulation_steps": spec.batch // spec.together,
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps,
        "warmup_steps": spec.warmup_steps,
        "activation_checkpointing": spec.checkpointing,
        "max_length": spec.max_length,
        "use_cpu": device == "cpu",
        "bf16": models.has_bfloat16(device),
        "seed": spec.seed,
        "data_seed": spec.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.startswith("cuda"),
        "train_sampling_strategy": "group_by_length",
    }


def follow(trainer: Trainer, name: str, quiet: bool, folder: Path) -> None:
    """Show the progress of a trainer in our own way, on stderr, and keep each step in `metrics.jsonl`."""
    from transformers import PrinterCallback, TrainerCallback

    class Follow(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar = Progress(name, state.max_steps, 0, quiet, unit="steps")
            self.file = open(folder / METRICS, "w", encoding="utf-8", buffering=1)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any
        ) -> None:
            shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
            notes = [f"{label} {float(logs[key]):.3f}" for key, label in shown.items() if logs and key in logs]
            self.bar.advance(state.global_step - self.bar.done, ", ".join(notes))
            kept = {LOGGED[key]: float(value) for key, value in (logs or {}).items() if key in LOGGED}
            if kept := {name: value if isfinite(value) else None for name, value in kept.items()}:
                self.file.write(json.dumps({"step": state.global_step, **kept}) + "\n")

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.close()
            self.file.close()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Follow())


def run_training(trainer: Trainer, tokens: int) -> dict[str, Any]:
    """Train and return steps, seconds, the tokens a second of the data, and the first and last loss."""
    started = time.monotonic()
    state = trainer.train()
    seconds = time.monotonic() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if any(loss != loss for loss in losses):
        raise SrlmError("the loss became NaN; no model is written", "lower --learning-rate")
    epochs = trainer.state.epoch or 0.0
    return {
        "steps": state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "train_loss": state.training_loss,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens * epochs / seconds, 1) if seconds else None,
    }


# --- the folder ------------------------------------------------------------------------------


def part_of(out: Path) -> Path:
    """Return the folder in which a model is made before it gets its name."""
    return out.with_name(out.name + ".part")


@contextmanager
def folder_when_whole(out: Path):
    """Give an empty OUT.part; when the block ends well it becomes OUT, in the place of an older one."""
    part = part_of(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(part / "trainer", ignore_errors=True)
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old)
    else:
        os.replace(part, out)


def save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, provenance: dict[str, Any]) -> None:
    """Write model, tokenizer and chat template into a folder, and the provenance file last."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    tokenizer.padding_side = "left"
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with open(folder / PROVENANCE, "w", encoding="utf-8") as file:
        json.dump(provenance, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def settings_of(spec: TrainSpec) -> dict[str, Any]:
    """Return a spec as the provenance file keeps it."""
    return {**asdict(spec), "out": str(spec.out)}
