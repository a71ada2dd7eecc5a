"""Options that sft, dpo and kto share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli.errors import OptionError
from srlm_cli.models.locate import is_adapter
from srlm_cli.options.common import (
    Attention,
    OnStale,
    ReadOptions,
    Revision,
    Seed,
    TemplateKwargs,
    Thinking,
    ThinkMarkers,
    Today,
    TrustRemoteCode,
)
from srlm_cli.options.unused import command_with
from srlm_cli.records import PROVENANCE
from srlm_cli.train.options import RunOptions, TrainSpec

Turns = Literal["reply", "all", "last"]
OnDuplicate = Literal["drop", "keep"]
TrainingDtype = Literal["auto", "float32", "bfloat16"]
Reference = Annotated[
    str,
    Option(
        "--ref",
        metavar="MODEL",
        help="Reference model: previous (the starting model), base (M0), or another model.",
    ),
]
RefCache = Annotated[
    bool,
    Option(
        "--ref-cache/--no-ref-cache",
        help="Keep the reference's log-probabilities for later runs, and read those of an earlier one.",
    ),
]
EvalFile = Annotated[
    str | None,
    Option(
        "--eval-file",
        metavar="FILE",
        help="Held-out rows; the checkpoint with the lowest loss on them becomes the model.",
    ),
]


@dataclass(frozen=True)
class TrainOptions(ReadOptions):
    """The training data and hyperparameters."""

    out: Annotated[
        str | None,
        Option("--out", "-o", metavar="FOLDER", help="Model folder to write; it appears when it is complete."),
    ] = None
    model: Annotated[
        str | None,
        Option(
            "--model", "-m", "--model-name-or-path", metavar="MODEL", envvar="SRLM_MODEL",
            help="Model to start from: folder, adapter folder, hub id, .gguf file, or smollm2-135m-instruct.",
        ),
    ] = None  # fmt: skip
    learning_rate: Annotated[float, Option("--learning-rate", min=0.0, help="Initial learning rate.")] = 5.5e-6
    final_learning_rate: Annotated[
        float, Option("--final-learning-rate", min=0.0, help="Final learning rate; cosine decay from --learning-rate.")
    ] = 1.1e-6
    train_batch_size: Annotated[
        int, Option("--train-batch-size", min=1, max=2**16, help="Rows per optimizer step (the paper: 16).")
    ] = 16
    device_batch_size: Annotated[
        int | None,
        Option(
            "--device-batch-size",
            min=1,
            show_default="1,024 tokens on a CPU, else 4",
            help="Rows per forward/backward pass on each device.",
        ),
    ] = None
    epochs: Annotated[float, Option("--epochs", min=0.0, max=1e6, help="Number of passes over the rows.")] = 1.0
    max_steps: Annotated[int, Option("--max-steps", min=-1, help="Stop after N steps; 0 or -1: unlimited.")] = -1
    warmup_steps: Annotated[int, Option("--warmup-steps", min=0, help="Warm-up steps of the learning rate.")] = 0
    weight_decay: Annotated[float, Option("--weight-decay", min=0.0, help="Weight decay.")] = 0.0
    optim: Annotated[
        str, Option("--optim", metavar="NAME", help="Optimizer, by its name in transformers, such as adamw_8bit.")
    ] = "adamw_torch_fused"
    dropout: Annotated[
        float, Option("--dropout", min=0.0, max=0.9, help="Dropout of the model or adapter (the paper: 0.1).")
    ] = 0.0
    max_length: Annotated[int, Option("--max-length", min=8, help="Maximum tokens per row.")] = 2048
    lora_r: Annotated[int, Option("--lora-r", min=0, help="LoRA rank; 0 trains all weights.")] = 0
    lora_alpha: Annotated[int, Option("--lora-alpha", min=0, show_default="2 x r", help="LoRA alpha.")] = 0
    lora_target: Annotated[
        list[str] | None,
        Option(
            "--lora-target", metavar="NAME", show_default="linear layers, without routers of experts",
            help="With --lora-r: layers that get an adapter, such as q_proj (repeatable).",
        ),
    ] = None  # fmt: skip
    lora_target_parameters: Annotated[
        list[str] | None,
        Option(
            "--lora-target-parameters", metavar="NAME",
            help="With --lora-r: also fused experts, such as experts.down_proj (repeatable).",
        ),
    ] = None  # fmt: skip
    merge: Annotated[bool, Option("--merge", help="Merge the adapter into the weights and save a full model.")] = False
    load_in_4bit: Annotated[
        bool, Option("--load-in-4bit", help="QLoRA: load the base weights in 4 bits with bitsandbytes.")
    ] = False
    checkpointing: Annotated[
        bool,
        Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute activations to save memory."),
    ] = False
    save_steps: Annotated[
        int, Option("--save-steps", min=0, show_default="every 10 minutes", help="Save a checkpoint every N steps.")
    ] = 0
    keep_checkpoints: Annotated[
        bool, Option("--keep-checkpoints", help="Keep the model of every checkpoint in FOLDER/checkpoints/STEP.")
    ] = False
    on_duplicate: Annotated[
        OnDuplicate, Option("--on-duplicate", help="Duplicate rows: drop and count them, or keep them.")
    ] = "drop"
    report_to: Annotated[
        str,
        Option(
            "--report-to", metavar="NAMES", help="Trackers of transformers, comma-separated, such as wandb,tensorboard."
        ),
    ] = "none"
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print data, one row with its loss mask, steps, memory and time; write nothing.")
    ] = False
    restart: Annotated[bool, Option("--restart", help="Delete FOLDER.part of an unfinished run.")] = False
    on_stale: Annotated[
        OnStale, Option("--on-stale", help="When FOLDER.part is from other settings: stop with exit 2, or restart.")
    ] = "stop"
    accelerate_config: Annotated[
        str | None,
        Option(
            "--accelerate-config", metavar="NAME",
            help="Train in several processes: a TRL profile (multi_gpu, fsdp2, zero2, ...) or an accelerate "
                 "config file.",
        ),
    ] = None  # fmt: skip
    num_processes: Annotated[
        int | None,
        Option(
            "--num-processes",
            min=1,
            show_default="from the profile",
            help="Number of processes for --accelerate-config.",
        ),
    ] = None
    device: Annotated[str, Option("--device", help="cpu, cuda or mps; auto picks the best available.")] = "auto"
    dtype: Annotated[
        TrainingDtype,
        Option(
            "--dtype",
            help="Compute dtype: float32 or bfloat16 (autocast); auto is bfloat16 on a GPU, a CPU with AMX or "
            "an AMD CPU with AVX512-BF16, else float32. Weights stay float32.",
        ),
    ] = "auto"
    train_thoughts: Annotated[
        bool,
        Option("--train-thoughts/--no-train-thoughts", help="Train on the thoughts of the rows, or leave them out."),
    ] = True
    train_turns: Annotated[
        Turns,
        Option(
            "--train-turns",
            help="Turns of the assistant to train on: the reply of each row; all, also those in its prompt; or last, "
            "only replies to the last turn of a sampled conversation.",
        ),
    ] = "reply"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    attn_implementation: Attention = None
    thinking: Thinking = "auto"
    template_kwargs: TemplateKwargs = None
    think_markers: ThinkMarkers = None
    today: Today = None
    seed: Seed = 0

    def run(self) -> RunOptions:
        """Return the run options, which do not change the trained model."""
        return RunOptions(
            quiet=self.quiet,
            restart=self.restart,
            on_stale=self.on_stale,
            dry_run=self.dry_run,
            save_steps=self.save_steps,
            keep_checkpoints=self.keep_checkpoints,
            report_to=self.report_to,
            keep_duplicates=self.on_duplicate == "keep",
        )

    def spec(self) -> TrainSpec:
        """Return these options as the trainers take them."""
        if not self.out or self.out == "-":
            raise OptionError("no --out FOLDER: a model cannot be written to stdout")
        if not self.model:
            raise OptionError("no model given", "--model takes a folder, a hub id or smollm2-135m-instruct")
        out = Path(self.out)
        if out.exists() and not (out.is_dir() and ((out / PROVENANCE).exists() or not any(out.iterdir()))):
            raise OptionError(f"{out} exists and is not a model made by srlm", "--out another folder, or remove it")
        return TrainSpec(
            model=self.model,
            out=out,
            learning_rate=self.learning_rate,
            final_learning_rate=min(self.final_learning_rate, self.learning_rate),
            batch=self.train_batch_size,
            device_batch_size=min(self.device_batch_size or 0, self.train_batch_size),
            epochs=self.epochs,
            max_steps=self.max_steps,
            max_length=self.max_length,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            dropout=self.dropout,
            merge=self.merge,
            load_in_4bit=self.load_in_4bit,
            lora_r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_target=tuple(self.lora_target or ()),
            lora_target_parameters=tuple(self.lora_target_parameters or ()),
            optim=self.optim,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            today=self.today or "",
            thinking=self.thinking,
            template_kwargs=self.template_kwargs,
            think_markers=self.think_markers,
            train_thoughts=self.train_thoughts,
            train_turns=self.train_turns,
            checkpointing=self.checkpointing,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
        )


def needs(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that have no effect without an adapter, with the option that they lack."""
    if values["lora_r"]:
        return {}
    model = values["model"]
    whole = model and not is_adapter(model) and (Path(model).exists() or "/" not in model)  # a hub id can be either
    return {"lora_alpha": "--lora-r"} | ({"merge": "--lora-r, or an adapter as --model"} if whole else {})


TrainCommand = command_with(needs=needs)


def by_input(paths: list[str], weights: list[float] | None) -> dict[str, float]:
    """Return the weight of each input by its path, 1 where none is given."""
    if weights and len(weights) != len(paths):
        raise OptionError(f"{len(weights)} --mix-weight for {len(paths)} --in", "give one for each, in their order")
    return dict(zip(paths, weights or [1.0] * len(paths), strict=True))
