"""What to train and how, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Settings that decide how a training runs, but not what it makes: an unfinished one goes on under others.
OPERATIONAL = {"out", "device_batch_size", "device", "checkpointing"}


@dataclass(frozen=True)
class TrainSpec:
    """How to train: `batch` sequences (or pairs) a step, `device_batch_size` of them at a time on the device.

    `device_batch_size` 0 is as many on a CPU as a pass is quickest with (`packing`), and 4 elsewhere. The
    learning rate falls by a cosine from `learning_rate` to `final_learning_rate`. `lora_r` 0 is full
    fine-tuning; an adapter folder as the model goes on being trained as that adapter; `merge` writes
    the adapter into the weights at the end, and `load_in_4bit` trains it on weights of 4 bits (QLoRA).
    `dtype` is that of a step's products: float32, bfloat16 (autocast), or auto, which `take` settles. `today` is the
    moment, in ISO form, that a chat template writes which asks for the date; `session.dated` settles an empty one.
    """

    model: str
    out: Path
    learning_rate: float
    final_learning_rate: float
    batch: int = 16
    device_batch_size: int = 0
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
    today: str = ""


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
