"""`--report-to`: trackers are told what a training logs, and what they write beside it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerCallback, integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from helpers import Srlm, read_rows, write_rows
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, tiny_model


class Tracker(TrainerCallback):
    """Writes as tensorboard does: into `runs` of the folder that the training names."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        folder = Path(args.output_dir) / "runs" / "today"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "events", "a", encoding="utf-8") as file:
            file.write(f"{state.global_step} {logs.get('loss')}\n")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base")


def test_what_a_tracker_writes_becomes_part_of_the_model(base, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mine", Tracker)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["mine"])
    rates = {"learning_rate": 1e-3, "final_learning_rate": 1e-4}
    spec = TrainSpec(model=str(base), out=tmp_path / "m", batch=2, device="cpu", **rates)
    sft(completions(6), spec, run=RunOptions(quiet=True, report_to="mine"))
    lines = (tmp_path / "m" / "runs" / "today" / "events").read_text(encoding="utf-8").splitlines()
    told = [(int(step), float(loss)) for step, loss in map(str.split, lines) if loss != "None"]
    logged = [(row["step"], row["loss"]) for row in read_rows(tmp_path / "m" / "metrics.jsonl")]
    assert [step for step, _ in told] == [1, 2, 3]
    assert [loss for _, loss in told] == pytest.approx([loss for _, loss in logged])


@pytest.mark.parametrize(
    "names, said",
    [("tensorbard", "no such tracker (one of "), ("comet_ml", "is not installed (pip install comet_ml)")],
)
def test_a_tracker_that_is_not_here_is_told_before_training(base, srlm: Srlm, names, said):
    write_rows(srlm.folder / "ift.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    done = srlm(
        "sft", "--in", "ift.jsonl", "--model", base, "--on-duplicate", "keep", "--out", "m", "--report-to", names
    )
    assert done.code == 2
    assert f"--report-to {names}: " in done.err and said in done.err
    assert not (srlm.folder / "m").exists()
