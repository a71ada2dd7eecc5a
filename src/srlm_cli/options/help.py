"""The sections of a command's help, and which option is in which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OWN = "Options"
SECTIONS = {
    "Input and output": "in out html shard limit on_error rejects",
    "Model": (
        "model revision trust_remote_code chat_template engine device dtype attn_implementation "
        "thinking template_kwargs think_markers today batch_size tokenizer "
        "tensor_parallel_size data_parallel_size max_model_len gpu_memory_utilization quantization engine_arg"
    ),
    OWN: "",
    "Sampling": (
        "sampling temperature top_p top_k min_p repetition_penalty presence_penalty stop max_new_tokens "
        "max_thinking_tokens"
    ),
    "Training": (
        "learning_rate final_learning_rate train_batch_size device_batch_size epochs max_steps warmup_steps "
        "weight_decay optim dropout max_length lora_r lora_alpha lora_target "
        "lora_target_parameters merge load_in_4bit checkpointing eval_file on_duplicate "
        "train_thoughts train_turns"
    ),
    "Server": "base_url route concurrency retries timeout extra_body check_sampling",
    "Run control": (
        "dry_run restart on_stale on_limit save_steps keep_checkpoints accelerate_config num_processes report_to "
        "seed config quiet help"
    ),
}  # fmt: skip
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names.split()}


def write_options(params: Iterable[Any], context: Any, formatter: Any) -> None:
    """Write the options of a command to its help, section by section."""
    found: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for param in params:
        if record := param.get_help_record(context):
            found[SECTION_OF.get(param.name.strip("_"), OWN)].append(record)
    for section, records in found.items():
        if records:
            with formatter.section(section):
                formatter.write_dl(records)
