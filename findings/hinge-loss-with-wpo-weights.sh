#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU).
#
# Expected: DPOConfig(use_weighting=True), the weights of WPO, works with each loss for which it is not refused. TRL refuses it for
# `aot` and `aot_unpaired` when the trainer is made, and names them.
# Seen: `loss_type="hinge"` is accepted, and the first training step raises a RuntimeError in the backward pass. The weights are
# multiplied in place into the result of relu, which autograd needs unchanged. `sigmoid` with the same settings trains.
#
# Consequence: a run ends after its model and data are loaded, with a message about autograd that names neither option.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from copy import deepcopy
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<end>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
pairs = Dataset.from_list([{"prompt": "Ask?", "chosen": "Good.", "rejected": "Bad."}])


def trained(loss: str) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))
    args = DPOConfig(
        output_dir="out", use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no", disable_tqdm=True,
        loss_type=loss, use_weighting=True,
    )
    trainer = DPOTrainer(model=model, ref_model=deepcopy(model), args=args, train_dataset=pairs, processing_class=tokenizer)
    try:
        trainer.train()
    except RuntimeError as error:
        return "in place" if "inplace operation" in str(error) else repr(error)
    return "trained"


seen = {loss: trained(loss) for loss in ("sigmoid", "hinge")}
print(f"trl {version('trl')}, torch {version('torch')}: one step with use_weighting: {seen}", file=sys.__stdout__)
sys.exit(seen != {"sigmoid": "trained", "hinge": "in place"})
PYTHON
