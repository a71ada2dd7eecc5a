#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
#
# Expected: Trainer.train(resume_from_checkpoint=...) gives a model the weights of the checkpoint that Trainer has written.
# Seen: of a Mixtral the experts and routers keep the weights that the model began with; all others are restored. In memory
# the experts of a layer are one tensor (`mlp.experts.gate_up_proj`), save_pretrained writes one tensor for each expert
# (`block_sparse_moe.experts.0.w1.weight`), and only from_pretrained knows how to read these: Trainer calls load_state_dict
# with strict=False. The same function loads the best model at the end (load_best_model_at_end).
#
# Consequence: a training that was interrupted continues with optimizer state of step N and experts of step 0, with a warning
# in the log and no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from torch.utils.data import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, at):
        row = torch.arange(6) + at
        return {"input_ids": row, "labels": row}


def model():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )


def trainer(net, steps):
    return Trainer(
        net,
        TrainingArguments(
            "out", max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=Rows(),
    )


first = model()
trainer(first, 2).train()
begun, second = dict(model().state_dict()), model()
trainer(second, 2)._load_from_checkpoint("out/checkpoint-2")
lost = [name for name, weight in second.named_parameters() if torch.equal(weight, begun[name])]
kept = [name for name, weight in second.named_parameters() if torch.equal(weight, first.state_dict()[name])]
print("restored:", len(kept), "tensors; as before the training:", ", ".join(lost))
assert any("self_attn" in name for name in kept), "nothing is restored"
assert any("experts" in name for name in lost), "the experts are restored now"
PYTHON
