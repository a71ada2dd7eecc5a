#!/usr/bin/env bash
# trl 1.16.0, datasets 5.2.0, transformers 5.23.0, torch 2.13.0 (CPU).
#
# Expected: `Dataset.from_list` makes a column for every key of the rows, with None where a row lacks it; so does
# `load_dataset("json")` for the same rows in a file, and so do nested keys in `from_list` itself.
# Seen: the columns are the keys of the first row. A key that only later rows have is left out without a warning.
#
# Consequence: TRL lets a row choose the options of its chat template by `chat_template_kwargs`. If the first row has none, those of
# all others are gone, and rows that asked for another rendering (thinking off, a date) are trained in the default one. This script
# shows the prompt tokens that SFTTrainer makes of the second row: with the row's option, and without it when a plain row comes first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
import trl
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<end>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
tokenizer.chat_template = (
    "{% if style %}[{{ style }}]{% endif %}{% for turn in messages %}{{ turn.role[0] }}:{{ turn.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))


def row(**options):
    turns = {"prompt": "Ask?", "completion": "So."}
    return {name: [{"role": role, "content": turns[name]}] for name, role in (("prompt", "user"), ("completion", "assistant"))} | (
        {"chat_template_kwargs": options} if options else {}
    )


def trained(rows):
    """Return the text that SFTTrainer makes of the last row."""
    args = SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", packing=False)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    return "".join(tokenizer.convert_ids_to_tokens(trainer.train_dataset[-1]["input_ids"]))


brief = row(style="brief")
Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (row(), brief)))
from_file = load_dataset("json", data_files="rows.jsonl", split="train")
seen = {
    "columns of from_list": Dataset.from_list([row(), brief]).column_names,
    "columns of the file": from_file.column_names,
    "the row alone": trained([brief]),
    "the row after a plain one": trained([row(), brief]),
}
print(f"datasets {datasets.__version__}, trl {trl.__version__}: {seen}", file=sys.__stdout__)
alone, after = seen["the row alone"], seen["the row after a plain one"]
has = [("chat_template_kwargs" in seen[name]) for name in ("columns of from_list", "columns of the file")]
sys.exit(has != [False, True] or "[brief]" not in alone or "[brief]" in after)
PYTHON
