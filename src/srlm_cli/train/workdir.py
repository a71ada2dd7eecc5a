"""OUT.part: the state of a training until its model is complete, for one training at a time.

    OUT.part/lock            held by the (main) process that trains
    OUT.part/state.json      what is trained, how, and on what (the fingerprint); the last whole checkpoint
    OUT.part/checkpoint-N/   weights, optimizer, schedule and random state after step N
    OUT.part/reference.json  log-probabilities of the reference, computed once
    OUT.part/metrics.jsonl   one line per step
    OUT.part/runs/           what a tracker (tensorboard) writes into the folder of a training
    OUT.part/model/          the model as it is being written; renamed to OUT when it is whole

A state that is not named in state.json is torn, and is thrown away.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.records import PROVENANCE, Record
from srlm_cli.streams.writer import refuse_other, replace_text
from srlm_cli.train.options import TrainSpec

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TRACKED = "runs"
REFERENCE = "reference"  # in a checkpoint: the reference, if it moves
# what a checkpoint has beside its model
STATE = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "global_step*", REFERENCE)
MEGABYTE = 2**20


class Workdir:
    """The folder OUT.part, locked; `checkpoint` is the last step whose state is whole, 0 before the first."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".part")
        self.model = self.folder / "model"
        self.metrics = self.folder / METRICS
        self.state = self.folder / "state.json"
        self.fingerprint: dict[str, Any] = {}
        self.checkpoint = self.best = 0
        self.best_value: float | None = None
        self.candidate: tuple[int, float] | None = None
        self.kept: list[int] = []
        self.keep_all = False

    def step(self, number: int) -> Path:
        """Return the folder of a checkpoint, as transformers names it."""
        return self.folder / f"checkpoint-{number}"

    def take(self, fingerprint: dict[str, Any], restart: bool, on_stale: str, keep_all: bool = False) -> None:
        """Resume an unfinished run with this fingerprint, or start a new one.

        With `keep_all` the models of all checkpoints are kept and become part of the model's folder.

        Raises OptionError for an unfinished run with another fingerprint, unless `restart`. With several processes the
        main one decides, and the others read its result.
        """
        self.fingerprint, self.keep_all = json.loads(json.dumps(fingerprint)), keep_all
        with distributed.main_first():
            self._take(restart and distributed.is_main(), on_stale)

    def begun_with(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return the fingerprint that an unfinished run left if it is this one with more fields, else nothing."""
        try:
            saved = json.loads(self.state.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError):
            return {}
        wanted = json.loads(json.dumps(fingerprint))
        return saved if {**saved, **wanted} == saved else {}

    def _take(self, restart: bool, on_stale: str) -> None:
        try:
            saved = json.loads(self.state.read_text(encoding="utf-8"))
            if not restart:
                refuse_other(self.folder, saved["fingerprint"], self.fingerprint)
                self.checkpoint, self.best, self.best_value = saved["checkpoint"], saved["best"], saved["best_value"]
                self.kept = saved["kept"]
                restart = bool(self.checkpoint) and not self.step(self.checkpoint).is_dir()
        except OptionError:
            if on_stale != "restart":
                raise
            restart = True
        except (OSError, ValueError, KeyError):
            restart = True
        if restart:
            self.checkpoint, self.best, self.best_value, self.kept = 0, 0, None, []
        if distributed.is_main():
            if restart:  # first of all: it names what goes
                self.state.unlink(missing_ok=True)
            for file in self.folder.iterdir():
                if file.name != "lock" and (restart or self._torn(file)):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            self._save()

    def keep(self, step: int) -> None:
        """Note that the checkpoint of a step is whole; those that are neither the last nor the best go."""
        if distributed.is_main():
            sync(self.step(step))
        self.checkpoint = step
        self.kept.append(step)
        if self.candidate and self.candidate[0] == step:
            self.best, self.best_value = self.candidate
        if distributed.is_main():
            self._save()
            self._clear(ignore_errors=False)

    def note_best(self, step: int, value: float) -> None:
        """Note that the model after a step is the best so far by its figure on held-out rows, once it is kept."""
        self.candidate = (step, value)

    def logged(self) -> list[Record]:
        """Return the steps of metrics.jsonl up to the last checkpoint; later ones are cut off, to be made again."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n") if self.metrics.exists() else []
        rows = [json.loads(line) for line in lines[:-1]]  # text after the last line feed is incomplete
        rows = [row for row in rows if row["step"] <= self.checkpoint]
        if distributed.is_main():
            replace_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn any error of a library that cannot write into one line that says how to resume."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
            free = shutil.disk_usage(self.folder).free // MEGABYTE
            if distributed.is_main():
                self._clear(ignore_errors=True)
            raise SrlmError(f"cannot write {what}: {reason} ({free} MB are free there)", self.way_on()) from error

    def way_on(self) -> str:
        """Return a hint that says how to resume after a failure."""
        if self.checkpoint:
            return f"run the same command again to resume from step {self.checkpoint}, in {self.folder}"
        return f"no model is written; no checkpoint yet in {self.folder}"

    def publish(self) -> None:
        """Let the model appear under its name, in the place of an older one."""
        for step in self.kept if self.keep_all else ():
            folder, beside = self.model / CHECKPOINTS / str(step), shutil.ignore_patterns(*STATE)
            shutil.copytree(self.step(step), folder, ignore=beside, copy_function=os.link)
        if (self.folder / TRACKED).exists():
            os.replace(self.folder / TRACKED, self.model / TRACKED)
        sync(self.model)
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
            os.replace(self.model, self.out)
            shutil.rmtree(old)
        else:
            os.replace(self.model, self.out)
        self.state.unlink()  # it names what goes
        shutil.rmtree(self.folder)

    def _clear(self, ignore_errors: bool) -> None:
        for file in self.folder.iterdir():
            if self._torn(file):
                shutil.rmtree(file, ignore_errors=ignore_errors)
        for step in {*self.kept} - {self.checkpoint, self.best}:  # which are never loaded by a trainer again
            for file in (found for pattern in STATE for found in self.step(step).glob(pattern)):
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _torn(self, file: Path) -> bool:
        steps = self.kept if self.keep_all else (self.checkpoint, self.best)
        whole = {f"checkpoint-{step}" for step in steps if step}
        return file.name.startswith("checkpoint-") and file.name not in whole

    def _save(self) -> None:
        state = {"checkpoint": self.checkpoint, "best": self.best, "best_value": self.best_value, "kept": self.kept}
        replace_text(self.state, json.dumps({"fingerprint": self.fingerprint, **state}, indent=1) + "\n")


@contextmanager
def locked(out: Path) -> Iterator[Workdir]:
    """Give OUT.part to this training alone, by its main process; raise OptionError while another one trains there."""
    workdir = Workdir(out)
    if not distributed.is_main():
        yield workdir
        return
    workdir.folder.mkdir(parents=True, exist_ok=True)
    with open(workdir.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"another srlm process is training {out}", "wait for it, or use another --out folder"
            ) from None
        yield workdir


@contextmanager
def place(out: Path, dry_run: bool) -> Iterator[Workdir]:
    """Give OUT.part, or for a dry run a folder that is gone afterwards."""
    if not dry_run:
        with locked(out) as workdir:
            yield workdir
        return
    with TemporaryDirectory(prefix="srlm-") as scratch:
        workdir = Workdir(Path(scratch) / "model")
        workdir.folder.mkdir()
        yield workdir


def write_provenance(folder: Path, provenance: dict[str, Any], spec: TrainSpec) -> None:
    """Write how a model was made into its folder, on the disk: the last file of a complete model."""
    settings = {**asdict(spec), "out": str(spec.out)}
    with open(folder / PROVENANCE, "w", encoding="utf-8") as file:
        json.dump({**provenance, "settings": settings}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Have all files of a folder on the disk before anything says that they are there."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
