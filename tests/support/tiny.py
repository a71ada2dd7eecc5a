"""A small random Llama with a byte tokenizer and a chat template of its own, for tests of training."""

from __future__ import annotations

from pathlib import Path

from helpers import Record

# One thread: models this small lose time with more, much of it where other tests run beside them.
ALONE = {"OMP_NUM_THREADS": "1"}

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}"
DATE = "<|system|>\nToday is {{ strftime_now('%d %b %Y, %H:%M:%S') }}.<|end|>\n"
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tiny_model(folder: Path, seed: int = 0, **config: object) -> Path:
    """Write a model of 2 layers and hidden size 32 with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**shape, "tie_word_embeddings": True, **config}))
    model.save_pretrained(folder)
    return folder


def base_model(folder: Path, **config: object) -> Path:
    """Write a model without a chat template, whose EOS ends a text, and which has no token for a turn."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **shape, **ends, **config}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def reward_model(folder: Path, kind: str = "llama", **config: object) -> Path:
    """Write a random reward model with one label, and the tokenizer of the tiny model."""
    import torch
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
        Qwen3Config,
        Qwen3ForSequenceClassification,
    )

    tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    heads = {"llama": LlamaForSequenceClassification, "qwen3": Qwen3ForSequenceClassification}
    more = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **shape}
    more |= {"num_key_value_heads": 2, "head_dim": 16} if kind == "qwen3" else {}
    torch.manual_seed(3)
    heads[kind](configs[kind](**{**more, **config})).save_pretrained(folder)
    return folder


def sequence(tokenizer, prompt: object, completion: object, today: str | None = None, **row: object):
    """Return the sequence of a row's completion."""
    from srlm_cli.engines.chat_template import ChatTemplate
    from srlm_cli.train.render import Renderer

    renderer = Renderer(tokenizer, ChatTemplate(tokenizer, today=today))
    return renderer.rendered({"prompt": prompt, "completion": completion, **row}, ("completion",))[0]


def tiny_adapter(folder: Path, base: Path, seed: int = 1, rank: int = 2) -> Path:
    """Write an adapter on a model, its weights random and not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def pairs(count: int) -> list[Record]:
    """Return pairs of unlike lengths."""
    return [
        {"prompt": f"Ask {n}?", "chosen": f"Good {n} " + "yes " * (n % 5), "rejected": f"Bad {n} " + "no " * (n % 3)}
        for n in range(count)
    ]


def labelled(count: int) -> list[Record]:
    """Return desirable and undesirable replies, each of its own length, to prompts of one length."""
    return [
        {"prompt": f"Ask {n:02}?", "completion": f"{'No' if n % 3 else 'Yes'} {n} " + "so " * n, "label": n % 3 == 0}
        for n in range(count)
    ]


def completions(count: int) -> list[Record]:
    """Return IFT rows of unlike lengths."""
    return [{"prompt": f"Ask {n}?", "completion": f"Answer {n} " + "word " * (n % 7)} for n in range(count)]


def with_template(base: Path, folder: Path, template: str) -> Path:
    """Return a model folder like another one, with another chat template."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder
