#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
#
# Expected: from_pretrained(key_mapping={r"^_orig_mod\.": ""}) reads a checkpoint of a compiled model, and save_pretrained of
# that model writes the plain names, as it does for any model.
# Seen: the prefix comes back into the file: the mapping is kept on the model and reversed on saving. A second
# from_pretrained of the saved folder, without the mapping, finds none of its tensors and initializes all of them at random.
#
# Consequence: the usual way to repair names (load with a mapping, save again) leaves the file as broken as it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained("compiled")
file = "compiled/model.safetensors"
save_file({f"_orig_mod.{name}": weight for name, weight in load_file(file).items()}, file, {"format": "pt"})

net, info = AutoModelForCausalLM.from_pretrained("compiled", key_mapping={r"^_orig_mod\.": ""}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"]
net.save_pretrained("repaired")
names = sorted(load_file("repaired/model.safetensors"))
print("saved as:", names[0])
_, info = AutoModelForCausalLM.from_pretrained("repaired", output_loading_info=True)
print("missing when it is loaded again:", len(info["missing_keys"]), "of", len(names))
assert all(name.startswith("_orig_mod.") for name in names), "save_pretrained writes plain names now"
PYTHON
