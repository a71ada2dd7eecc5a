"""How fast each engine samples from models that are not Llamas: random weights, SmolLM2-135M's size and tokenizer.

    python benchmarks/engines/architectures.py --data ../shared/data/eval_prompts --results architectures.jsonl
    python benchmarks/engines/architectures.py --data FOLDER --architectures qwen3 --prompts 8,transformers=4

Each completion has exactly --max-new-tokens tokens: the weights are made so that no token that ends a text is ever
drawn, and other tokens about as unevenly as by a trained model. All engines run one architecture in turn, then the
next. --results keeps the rows, and the same command continues after those that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from race import Contender, command_line, hardware, options, raced, rate, spread, write_section
from sample import PROMPT_DATA, prompt_data, prompts

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import output_file

from srlm_cli.models.load import load_config, load_tokenizer, quiet_libraries

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
         "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),  # a sliding window
    "qwen2": ("Qwen2Config", {}),  # biases
    "qwen3": ("Qwen3Config", {"head_dim": 64}),  # norms of queries and keys
    "phi3": ("Phi3Config", {}),  # one product for queries, keys and values, one for gates and up
    "olmo2": ("Olmo2Config", {}),  # norms after attention and MLP, and of queries and keys
    "gemma3": ("Gemma3TextConfig", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),  # LayerNorm, attention beside the MLP, no gates
}
SHARPNESS = 6.0  # logits have a standard deviation of 2.9: at temperature 0.7 top-p 0.9 keeps some hundreds of tokens


def make_model(name: str, like: str, folder: Path) -> None:
    """Write a model of an architecture with random weights, and the size and the tokenizer of another."""
    kind, more = ARCHITECTURES[name]
    shape = load_config(like)
    sizes = {**{name: getattr(shape, name) for name in SIZES}, **more}
    config = getattr(transformers, kind)(**{name: size for name, size in sizes.items() if size is not None})
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(like)
    norm = getattr(net.base_model, "norm", None) or net.base_model.final_layer_norm
    with torch.no_grad():
        norm.weight.add_(SHARPNESS - 1)
        net.get_output_embeddings().weight[tokenizer.all_special_ids] = 0.0  # far less likely than what top-p keeps
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name: str, given: argparse.Namespace) -> dict:
    """Return the rates of all contenders on one architecture, repeat by repeat."""
    with tempfile.TemporaryDirectory() as scratch:
        make_model(name, given.model, Path(scratch))
        most = max(int(part.rpartition("=")[2]) for part in given.prompts.split(","))
        rows = Path(scratch) / "prompts.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in prompts(given.data, most)))
        sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": given.max_new_tokens}
        work = {"task": "sample", "rows": str(rows), "each": given.n, "sampling": sampling}
        of_this = argparse.Namespace(**{**vars(given), "model": scratch})
        contenders = raced(of_this, work, stops=[], counted="tokens", unit="tokens", requests=given.prompts)
    for one in contenders:
        check(one, name, given.max_new_tokens)
    return {
        "architecture": name,
        "rates": {one.name: [rate(run, "tokens") for run in one.runs] for one in contenders},
        "about": {one.name: f"{one.dtype}, {one.rows} in parallel, {numbers(one)}" for one in contenders},
    }


def check(contender: Contender, name: str, length: int) -> None:
    """End the benchmark if a completion of an engine had another length."""
    if any(run["tokens"] != run["rows"] * length for run in contender.runs):
        sys.exit(f"{name}: {contender.name} wrote completions of another length than {length}: {contender.runs}")


def numbers(contender: Contender) -> str:
    """Return the versions of a contender."""
    return ", ".join(f"{name} {number}" for name, number in contender.versions.items())


def as_table(rows: list[dict]) -> str:
    """Return the rates as a Markdown table, with the ratio of the first engine to the others, repeat by repeat."""
    first, *others = rows[0]["rates"]
    titles = ["architecture", *(f"{name}, tokens/s" for name in rows[0]["rates"])]
    titles += [f"{first} / {name}" for name in others]
    lines = [f"- {name}: {about}" for name, about in rows[0]["about"].items()]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        rates = row["rates"]
        ratios = [[a / b for a, b in zip(rates[first], rates[name], strict=True)] for name in others]
        cells = [spread(of, 0) for of in rates.values()] + [spread(of, 2) for of in ratios]
        lines.append(f"| {' | '.join([row['architecture'], *cells])} |")
    return "\n".join(lines)


def named(text: str) -> list[str]:
    """Return the architectures that a command line names."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"no such architecture: {', '.join(unknown)}")
    return names


def main() -> None:
    """Run all architectures and print a table."""
    parser = options(__doc__, "prompts", probe=16)
    parser.add_argument("--data", type=prompt_data, required=True, help=PROMPT_DATA)
    parser.add_argument("--prompts", default="48,transformers=8", help="how many; 'transformers=8' is for one alone")
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--architectures", type=named, default=list(ARCHITECTURES), help=", ".join(ARCHITECTURES))
    parser.add_argument("--results", type=output_file, metavar="FILE", help="JSONL file of rows; those in it are kept")
    parser.set_defaults(max_new_tokens=64, repeats=1, rows="128,srlm=256,transformers=32")
    given = parser.parse_args()
    quiet_libraries()
    print(f"{command_line()}\n{hardware()}", flush=True)
    kept = given.results.read_text(encoding="utf-8").splitlines() if given.results and given.results.exists() else []
    rows = {row["architecture"]: row for row in map(json.loads, kept)}
    for name in given.architectures:
        if name not in rows:
            print(name, flush=True)
            rows[name] = run(name, given)
            if given.results:
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[name]) + "\n")
    table = as_table(list(rows.values()))
    print(table)
    if given.write:
        about = (
            f"{hardware()}. Random weights, {given.prompts} prompts x {given.n}, {given.max_new_tokens} new tokens each"
        )
        write_section(given.write, "architectures", f"{about}. Made by `{command_line()}`.\n\n{table}")


if __name__ == "__main__":
    main()
