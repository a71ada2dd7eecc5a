"""How fast this processor multiplies in 16 bits against float32, and what becomes of a model's probabilities.

    python benchmarks/dtypes.py [--data FOLDER] [--prompts N]

Products have the sizes of the embedded model. Decides what `--dtype auto` should be: `pick_dtype` (models/hardware.py)
says what it is. With `--data` (prompts, as in `engines/sample.py`) the embedded model reads prompts in each type:
the mean divergence of its next-token distributions from those in float32, and how often the first token is another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engines"))

import torch
from race import hardware
from sample import PROMPT_DATA, prompt_data, prompts

from srlm_cli.forward.cpu import linear
from srlm_cli.forward.cpu.linear import HalfLinear
from srlm_cli.models.hardware import pick_dtype
from srlm_cli.models.load import load_model, load_tokenizer, quiet_libraries

LAYERS, WIDE, NARROW = 60, 1536, 576
MODEL = "smollm2-135m-instruct"


def layers() -> dict[str, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """Return layers of the size (576, 1536) by how they multiply; each takes float32 rows or what is said."""
    plain = [torch.nn.Linear(NARROW, WIDE, bias=False) for _ in range(LAYERS)]
    made = {"float32": plain}
    for dtype in (torch.bfloat16, torch.float16):
        weights = [layer.weight.detach().to(dtype) for layer in plain]
        made[f"{named(dtype)} by torch"] = [
            lambda rows, weight=weight: torch.nn.functional.linear(rows.to(weight.dtype), weight) for weight in weights
        ]
    if half := own():
        made[f"{named(half)} by srlm"] = [HalfLinear(layer, half) for layer in plain]
    return made


def own() -> torch.dtype | None:
    """Return the type of 16 bits that srlm multiplies in on this processor itself."""
    return linear.type_for(pick_dtype("auto", "cpu", float16=True), "cpu")


def named(dtype: torch.dtype) -> str:
    """Return the name of a type."""
    return str(dtype).removeprefix("torch.")


def seconds(several: list[Callable[[torch.Tensor], torch.Tensor]], rows: torch.Tensor) -> float:
    """Return the time of one product."""
    started = time.perf_counter()
    for layer in several:
        layer(rows)
    return (time.perf_counter() - started) / len(several)


def speed() -> None:
    """Time all in turn and print their ratios to float32 for each number of rows."""
    made = layers()
    for count in (1, 16, 64, 128, 256, 1024):
        rows = torch.randn(count, NARROW)
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(8):  # the first is not counted
            for name, several in made.items():
                times[name].append(seconds(several, rows))
        said = []
        for name in list(made)[1:]:
            ratios = sorted(a / b for a, b in zip(times[name][1:], times["float32"][1:], strict=True))
            said.append(f"{name} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"{count:5} rows, of float32's time: {', '.join(said)}", flush=True)


def divergence(data: Path, count: int) -> None:
    """Print how far distributions are from those in float32."""
    tokenizer = load_tokenizer(MODEL)
    texts = [tokenizer(row["prompt"], truncation=True, max_length=512)["input_ids"] for row in prompts(data, count)]
    exact = load_model(MODEL, "float32").eval()
    others = {"bfloat16 by torch": load_model(MODEL, "bfloat16").eval()}
    if half := own():
        others[f"{named(half)} by srlm"] = load_model(MODEL, "float32").eval()
        linear.use_in(others[f"{named(half)} by srlm"], half)
    sums, unlike, positions = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0), 0
    for ids in texts:
        wanted = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
        positions += len(wanted)
        for name, net in others.items():
            given = net(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            sums[name] += (wanted.exp() * (wanted - given)).sum().item()
            unlike[name] += (wanted.argmax(-1) != given.argmax(-1)).sum().item()
    print(f"{len(texts)} prompts, {positions} positions, from float32:")
    for name in others:
        print(f"  {name}: {sums[name] / positions:.1e} nats, another first token {unlike[name] / positions:.2%}")


def main() -> None:
    """Print the speed, and with prompts what becomes of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=prompt_data, help=PROMPT_DATA)
    parser.add_argument("--prompts", type=int, default=50)
    given = parser.parse_args()
    quiet_libraries()
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(f"{hardware()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"auto: {pick_dtype('auto', 'cpu', float16=True)}, multiplied by {'srlm' if own() else 'torch'}")
    with torch.inference_mode():
        speed()
        if given.data:
            divergence(given.data, given.prompts)


if __name__ == "__main__":
    main()
