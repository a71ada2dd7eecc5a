"""What to train and how, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Settings that do not change the trained model; a run can be resumed with other values.
OPERATIONAL = {"out", "device_batch_size", "device", "checkpointing", "trust_remote_code"}


@dataclass(frozen=True)
class TrainSpec:
    """How to train: `batch` sequences (or pairs) per step, `device_batch_size` per forward and backward pass.

    `device_batch_size` 0 selects the fastest number on a CPU (see `packing`), and 4 elsewhere. The learning rate
    decays by a cosine from `learning_rate` to `final_learning_rate`. `lora_r` 0 is full fine-tuning; if the model is
    an adapter folder, this adapter is trained further. `lora_target` and `lora_target_parameters` name what gets a
    new adapter (see `lora.add_adapter`), `optim` is the optimizer by its name in transformers. `merge` merges the
    adapter into the weights at the end, and `load_in_4bit` trains it on 4-bit weights (QLoRA). `dtype` is that of
    matrix products: float32, bfloat16 (autocast) or auto, which `session.take` resolves. `today` is the date, in ISO
    format, for chat templates that write it; `session.dated` sets an empty one. `thinking`, `template_kwargs` and
    `think_markers` are as in `EngineSpec`; with `train_thoughts` thoughts are part of the targets. `train_turns` is
    `reply`, `all` or `last` (see `data.of_turns`). `chat_template` names the template that a base model gets (see
    `clone_template`). `revision`, `trust_remote_code` and `attn_implementation` are as in `EngineSpec`.
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
    lora_target: tuple[str, ...] = ()
    lora_target_parameters: tuple[str, ...] = ()
    optim: str = "adamw_torch_fused"
    merge: bool = False
    load_in_4bit: bool = False
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    checkpointing: bool = False
    today: str = ""
    thinking: str = "auto"
    template_kwargs: str | None = None
    think_markers: tuple[str, str] | None = None
    train_thoughts: bool = True
    train_turns: str = "reply"
    chat_template: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True)
class RefSync:
    """TR-DPO (arXiv 2404.09656): after every `sync_steps` steps the reference moves towards the policy.

    It becomes `mixup` x policy + (1 - `mixup`) x reference.
    """

    sync_steps: int
    mixup: float

    def trl(self) -> dict[str, float]:
        """Return the settings of `trl.DPOConfig`."""
        return {"ref_model_sync_steps": self.sync_steps, "ref_model_mixup_alpha": self.mixup}


@dataclass(frozen=True)
class RunOptions:
    """How a training is run; only `keep_duplicates` changes the trained model.

    `save_steps` 0 saves every ten minutes. With `ref_cache` the log-probabilities of a reference are kept across runs
    (see `reference_cache`). `on_empty` is what happens when no record is left to train on: `stop` with an error, or
    `copy` the model.
    """

    quiet: bool = False
    restart: bool = False
    on_stale: str = "stop"
    dry_run: bool = False
    save_steps: int = 0
    keep_checkpoints: bool = False
    report_to: str = "none"
    keep_duplicates: bool = False
    ref_cache: bool = False
    on_empty: str = "stop"
