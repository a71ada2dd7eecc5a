"""A training while it runs: progress on stderr, one line per step in metrics.jsonl, checkpoints, a stop at NaN."""

from __future__ import annotations

import json
import os
import time
from math import isfinite
from typing import TYPE_CHECKING, Any

from srlm_cli import distributed
from srlm_cli.errors import ExitCode, SrlmError
from srlm_cli.streams.console import Progress
from srlm_cli.train.workdir import Workdir

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from srlm_cli.train.options import RunOptions

SECONDS_BETWEEN_CHECKPOINTS = 600.0

# The figures of each logged step, with their names in srlm; rewards are beta x log-ratios, as in TRL.
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "lengths/chosen": "length_chosen",
    "lengths/rejected": "length_rejected",
    "kl": "kl",
}
SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


def follower(workdir: Workdir, name: str, run: RunOptions, chooses: bool) -> TrainerCallback:
    """Return the callback of a trainer that shows, keeps and guards its steps.

    One that `chooses` measures each checkpoint on held-out rows, also the last, and keeps the best:
    that of the lowest loss.
    """
    from transformers import TrainerCallback

    class Follower(TrainerCallback):
        bar: Progress | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar = Progress(name, state.max_steps, state.global_step, run.quiet, unit="steps")
            metrics = workdir.metrics if distributed.is_main() else os.devnull
            self.file = open(metrics, "a", encoding="utf-8", buffering=1)
            self.started = self.saved = self.stepped = time.monotonic()
            self.tokens_before = self.tokens = state.num_input_tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            due = (
                state.global_step % run.save_steps == 0
                if run.save_steps
                else distributed.broadcast(time.monotonic() - self.saved >= SECONDS_BETWEEN_CHECKPOINTS)
            )
            last = state.global_step >= state.max_steps  # its model is written anyway, unless another may be better
            control.should_save = chooses if last else due
            control.should_evaluate = chooses and control.should_save

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **rest: Any) -> None:
            if workdir.best_value is None or metrics["eval_loss"] < workdir.best_value:
                workdir.note_best(state.global_step, metrics["eval_loss"])

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.saved = time.monotonic()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any
        ) -> None:
            kept = {LOGGED[key]: float(value) for key, value in (logs or {}).items() if key in LOGGED}
            if "loss" not in kept:
                return
            now = time.monotonic()
            kept["tokens_per_second"] = round((state.num_input_tokens_seen - self.tokens) / (now - self.stepped), 1)
            self.tokens, self.stepped = state.num_input_tokens_seen, now
            finite = {key: value if isfinite(value) else None for key, value in kept.items()}
            self.file.write(json.dumps({"step": state.global_step, **finite}) + "\n")
            if bad := [key for key in ("loss", "grad_norm") if finite.get(key, 0.0) is None]:
                if not distributed.is_main():  # which says so
                    raise SystemExit(ExitCode.FAILURE)
                raise SrlmError(
                    f"step {state.global_step}: {bad[0]} is not a finite number",
                    f"lower --learning-rate; {workdir.way_on()}",
                )
            speed = (self.tokens - self.tokens_before) / (now - self.started)
            notes = [f"{label} {float(logs[key]):.3f}" for key, label in SHOWN.items() if key in logs]
            self.bar.advance(state.global_step - self.bar.done, ", ".join([f"{speed:.0f} tokens/s", *notes]))

        def close(self) -> None:
            """Take the progress off the screen and close the file."""
            if self.bar:
                self.bar.close()
                self.file.close()

    return Follower()
