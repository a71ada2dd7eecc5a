#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
#
# Expected: a DPOTrainer that is given a trained adapter (a PeftModel) uses a frozen copy of this adapter as the reference, so that
# policy and reference agree before the first step.
# Seen: the copy lacks the embeddings that the adapter trains by token (`trainable_token_indices` of peft's LoraConfig, which TRL's own
# SFTTrainer sets when it clones a chat template). In the reference these tokens have the embeddings of the base model. TRL copies
# the parameters whose names contain `.default.`; the name of these ends with `.default`.
#
# Consequence: DPO compares the policy with another model than the one that it started from. Nothing is raised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 peft==0.21.2 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<end>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=257, tie_word_embeddings=True, **sizes))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [256]}))
with torch.no_grad():  # as a training has moved them
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.add_(1.0)
pairs = Dataset.from_list([{"prompt": "Ask?", "chosen": "Good.", "rejected": "Bad."}])
trainer = DPOTrainer(
    model=model, args=DPOConfig(output_dir="out", use_cpu=True, report_to="none"), train_dataset=pairs, processing_class=tokenizer
)
weights = dict(trainer.model.named_parameters())
apart = [
    name for name, weight in weights.items()
    if "default" in name.split(".") and not torch.equal(weight, weights[".".join("ref" if p == "default" else p for p in name.split("."))])
]
copied = sum("ref" in name.split(".") for name in weights) - len(apart)
print(f"trl {version('trl')}, peft {version('peft')}: {copied} tensors of the adapter are in the reference, these differ: {apart}")
sys.exit(not (len(apart) == 1 and apart[0].endswith("trainable_tokens_delta.default") and copied > 0))
PYTHON
