"""Causal LMs with random weights and a byte tokenizer, made in a moment, of several architectures."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 257,
    "pad_token_id": 258,
}  # fmt: skip
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": 257}
KINDS = {  # with heads of 16 a step on a processor is compiled, with heads of 8 it is not
    "llama": ("LlamaConfig", {**SIZES, "hidden_size": 64}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "phi3": ("Phi3Config", SIZES),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mistral": ("MistralConfig", {**SIZES, "hidden_size": 64, "sliding_window": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {**SIZES, "head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8, "sliding_window": 24}),  # soft-capped scores
    "bloom": ("BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}),  # ALiBi
    "lfm2": ("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"]}),  # a hybrid
    "mamba": ("MambaConfig", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}),
    "dynamic": ("LlamaConfig", {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}),
}  # fmt: skip
PACKED = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "mistral", "gemma3")
PLAIN = ("gemma2", "bloom", "lfm2", "mamba", "dynamic")


def save(folder: Path, kind: str = "llama", sharpness: float = 4.0) -> Path:
    """Write a model folder that `srlm` can load; `sharpness` scales the logits, so that greedy choices are clear."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: at for at, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<start>", "<end>", "<pad>"])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = (
        "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant:{% endif %}"
    )
    wrapped.save_pretrained(folder)
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, initializer_range=0.1))
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(sharpness)
    net.generation_config.eos_token_id = 257
    net.save_pretrained(folder)
    return folder
