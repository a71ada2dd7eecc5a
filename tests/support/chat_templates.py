"""The chat templates that TRL ships, each with a byte tokenizer that knows their special tokens."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files("trl").joinpath("chat_templates")))
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
# What ends a turn, by how the name of a template begins; <|im_end|> for the others.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "gemma": "<end_of_turn>",
    "gemma4": "<turn|>", "diffusion_gemma": "<turn|>", "glm": "<|user|>", "gptoss": "<|return|>",
    "idefics": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "llama": "<|eot_id|>", "llava": "</s>",
    "muse": "<|eot|>", "phi3": "<|end|>",
}  # fmt: skip
SPECIAL = re.compile(r"<[|｜][^<>'\" {}\n]{1,30}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|<EOS>")
PLAIN = ("<think>", "</think>")  # tokens of their own that are text


def source(name: str) -> str:
    """Return the text of a template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def end_of(name: str) -> str:
    """Return the token that ends a turn."""
    found = [start for start in ENDS if name.startswith(start)]
    return ENDS[max(found, key=len)] if found else "<|im_end|>"


def tokenizer(name: str):
    """Return a byte tokenizer with a template and its special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text, end = source(name), end_of(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = sorted({*SPECIAL.findall(text), end, "<pad>", "<s>"})
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, normalized=False) for token in PLAIN if token in text])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token="<pad>", clean_up_tokenization_spaces=False,
        **({"bos_token": "<s>"} if "bos_token" in text else {}),
    )  # fmt: skip
    found.chat_template = text
    return found
