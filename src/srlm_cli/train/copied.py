"""The model of a training without records: a copy of the model that it starts from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import OptionError
from srlm_cli.models.files import read_settings
from srlm_cli.models.hardware import pick_device
from srlm_cli.models.locate import locate
from srlm_cli.records import PROVENANCE
from srlm_cli.train.options import TrainSpec
from srlm_cli.train.workdir import CHECKPOINTS, METRICS, TRACKED, Workdir, place, write_provenance

OF_ITS_TRAINING = (PROVENANCE, METRICS, CHECKPOINTS, TRACKED)


def copy_model(spec: TrainSpec, identity: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write the model folder OUT with the files of the starting model, and a provenance of its own.

    An unfinished training in OUT.part is removed: it had records. Raises OptionError if the model is not a folder.
    """
    source = Path(locate(spec.model))
    if not source.is_dir():
        raise OptionError(f"--on-empty copy: {spec.model} is not a folder", "--model takes a model folder, too")
    distributed.init(pick_device(spec.device))
    with place(spec.out, dry_run=False) as workdir:
        workdir.take(identity, restart=True, on_stale="restart")
        if distributed.is_main():
            with workdir.writing("the model"):
                write(workdir, source, spec, provenance)


def write(workdir: Workdir, source: Path, spec: TrainSpec, provenance: dict[str, Any]) -> None:
    """Copy the files of a model, write its provenance, and let the folder appear."""
    shutil.copytree(source, workdir.model, ignore=shutil.ignore_patterns(*OF_ITS_TRAINING))
    (workdir.model / METRICS).touch()
    about = source / PROVENANCE
    base = read_settings(about).get("base") if about.is_file() else None  # of an adapter
    write_provenance(workdir.model, {**provenance, **({"base": base} if base else {})}, spec)
    workdir.publish()
