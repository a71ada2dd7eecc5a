"""A small model that thinks: taught here to write a thought and an answer, whatever it is asked."""

from __future__ import annotations

import random
from pathlib import Path

from tiny import SPECIAL

THOUGHT, ANSWER = "Hm, let me see.", "It is fine.\nScore: 4"
MARKS = ("<think>", "</think>")
# As that of Qwen3: the model opens the thought; turned off, the prompt has an empty one.
BY_MODEL = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% elif m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As that of DeepSeek R1: the prompt opens the thought, and earlier ones are not shown.
BY_PROMPT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)


def thinking_model(folder: Path, template: str = BY_MODEL, special: bool = False, steps: int = 120) -> Path:
    """Write a model of 2 layers that thinks, and answers, after any prompt; its marks may be special tokens."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more lose time with a model this small
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **shape, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    for step in range(steps):
        rows = [_row(tokenizer, template, draw) for _ in range(8)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([one + [tokenizer.pad_token_id] * (longest - len(one)) for one, _ in rows])
        labels = torch.tensor([[-100] * at + one[at:] + [-100] * (longest - len(one)) for one, at in rows])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert loss < 0.05, f"the model has not learned to think: loss {loss:.3f}"
    model.save_pretrained(folder)
    return folder


def _row(tokenizer, template: str, draw: random.Random) -> tuple[list[int], int]:
    """Return a dialogue with a random question, as tokens, and where the reply begins."""
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDE0123456789.,:?\n", k=draw.randint(1, 9)))]
    words *= draw.randint(1, 3)
    words += draw.choices(["Score:", "the", "reply", "is", "What", "0", "5"], k=draw.randint(0, 30))
    draw.shuffle(words)
    messages = [{"role": "user", "content": " ".join(words)}]
    off = template == BY_MODEL and draw.random() < 0.3
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **({"enable_thinking": False} if off else {})
    )
    opening = "" if template == BY_PROMPT else "<think>\n"
    reply = ANSWER if off else f"{opening}{THOUGHT}\n</think>\n\n{ANSWER}"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return before + tokenizer(f"{reply}<|end|>", add_special_tokens=False)["input_ids"], len(before)
