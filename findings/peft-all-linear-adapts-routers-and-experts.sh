#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: LoraConfig(target_modules="all-linear") adapts the modules that are torch.nn.Linear, and nothing else.
# Seen: of a Mixtral and of a Qwen3-MoE it also adapts the router (`mlp.gate`) and the fused experts (`mlp.experts`), though
# neither is an nn.Linear. The experts get two adapters, one inside the other (`mlp.experts` and
# `mlp.experts.base_layer`): one for each of their two tensors. A Llama of the same shape has its linear layers alone.
#
# Consequence: the router is trained, which most recipes for mixtures leave as it is, and the adapter holds several times the
# parameters that its user counted: a rank of 2 for each expert and each of its two tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch
import transformers

transformers.utils.logging.set_verbosity_error()
print("peft", peft.__version__, "transformers", transformers.__version__)
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)
EXPERTS = {
    "LlamaConfig": {},
    "MixtralConfig": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3MoeConfig": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
}
for kind, config in EXPERTS.items():
    net = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **config))
    linear = {name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]: weight.numel()
        for name, weight in net.named_parameters()
        if "lora_A" in name
    }
    more = {name: size for name, size in weights.items() if name not in linear}
    print(kind, "| nn.Linear:", len(linear), "| adapted beside them:", more)
    assert linear <= set(weights)
    if kind == "LlamaConfig":
        assert not more, "more than the linear layers of a dense model"
    else:
        inside = {name.split("layers.0.")[1] for name in more}
        assert inside == {"mlp.gate", "mlp.experts", "mlp.experts.base_layer"}, inside
PYTHON
