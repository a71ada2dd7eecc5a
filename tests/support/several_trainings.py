"""Trainings one behind the other in the processes of a launcher: `several_trainings.py JOBS.json`.

A job has the kind, the specification, the rows held out, the options of the loss, whether the weights are
sharded, and the micro-batch in which it dies, in all processes.
"""

import json
import sys
from pathlib import Path

import accelerate.state
import transformers
from accelerate import DistributedType

from srlm_cli import distributed
from srlm_cli.errors import SrlmError
from srlm_cli.train.dpo import dpo
from srlm_cli.train.kto import kto
from srlm_cli.train.losses import DPOLossConfig, KTOLossConfig
from srlm_cli.train.options import RefSync, RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, labelled, pairs

made, step = accelerate.state.AcceleratorState.__init__, transformers.Trainer.training_step


class Killed(BaseException):
    """Ends a training as kill -9 does."""


def sharding(self, *args, fsdp_plugin=None, **named):
    """Begin accelerate's state with its FSDP plugin, which on CPUs it would leave aside."""
    made(self, *args, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs as it does on GPUs."""
    kind = property(lambda self: DistributedType.FSDP, lambda self, value: None)
    accelerate.state.AcceleratorState.distributed_type = kind
    accelerate.state.AcceleratorState.__init__ = sharding


def train(
    kind: str, rows: int, spec: dict, held: int = 0, about: dict | None = None, sync=None, dies: int = 0, seen=None
) -> None:
    """Train one model, up to the micro-batch that it dies in."""
    done = []

    def mortal(self, *args, **named):
        done.append(1)
        if len(done) == dies:
            raise Killed
        wrapped = type(self.model_wrapped).__name__
        assert seen is None or seen in wrapped, wrapped
        return step(self, *args, **named)

    transformers.Trainer.training_step = mortal
    make, train_on, options = {
        "sft": (completions, sft, {}),
        "dpo": (
            pairs,
            dpo,
            {"loss_config": DPOLossConfig(**about or {}), "sync": sync and RefSync(*sync)} if kind == "dpo" else {},
        ),
        "kto": (labelled, kto, {"loss_config": KTOLossConfig(**about or {})} if kind == "kto" else {}),
    }[kind]
    spec = TrainSpec(**{**spec, "out": Path(spec["out"])})
    # Prompts of other numbers than those of the training.
    held_out = make(rows + held)[rows:] or None
    train_on(make(rows), spec, **options, eval_rows=held_out, run=RunOptions(quiet=True, save_steps=2))


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if any(job.get("seen") == "FSDP" for job in jobs):
        shard_on_cpus()
    for job in jobs:
        try:
            train(**job)
        except Killed:
            pass
        except SrlmError as error:
            if distributed.is_main():
                print(error, flush=True)


if __name__ == "__main__":
    main()
