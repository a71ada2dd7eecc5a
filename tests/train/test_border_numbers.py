"""Numbers at the borders of the training options: a model of finite weights, or an error of one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import Srlm, as_lines, slow
from tiny import ALONE, completions, pairs, tiny_model

MOST = "1.7e308"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.mark.parametrize(
    "line",
    [
        slow("sft --learning-rate 0"),
        "sft --learning-rate 5e-324 --final-learning-rate 5e-324 --weight-decay 5e-324",
        slow("sft --epochs 0"),
        "sft --epochs 5e-324 --train-batch-size 65536 --save-steps 4294967295 --warmup-steps 4294967295",
        slow("sft --epochs 1e6 --max-steps 1 --device-batch-size 4294967295"),
        slow("sft --max-steps 0 --max-length 4294967295 --seed 4294967295"),
        "dpo --beta 0 --label-smoothing 0.499 --nll-alpha 0",
        slow("dpo --ld-alpha 0 --train-batch-size 65536"),
        slow("dpo --loss r-dpo --rdpo-alpha 5e-324 --beta 5e-324"),
    ],
)
def test_a_number_at_the_border_makes_a_model_of_finite_weights(srlm: Srlm, base: Path, line: str) -> None:
    result = trained(srlm, base, line)
    assert result.code == 0, result.err
    weights = load_file(srlm.folder / "m" / "model.safetensors")
    assert weights and all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    "line",
    [
        f"sft --learning-rate {MOST} --max-steps 1",
        f"sft --weight-decay {MOST} --max-steps 1",
        f"dpo --beta {MOST} --max-steps 1",
        f"dpo --nll-alpha {MOST} --max-steps 1",
    ],
)
def test_a_training_that_diverges_writes_no_model(srlm: Srlm, base: Path, line: str) -> None:
    result = trained(srlm, base, line)
    assert result.code == 1 and " not finite" in result.err.replace("not a finite number", "not finite"), result.err
    assert "lower --learning-rate" in result.err and not (srlm.folder / "m").exists()


def trained(srlm: Srlm, base: Path, line: str):
    """Train a tiny model."""
    rows = completions(4) if line.startswith("sft") else pairs(4)
    argv = [*line.split(), "--model", str(base), "--out", "m", "--device", "cpu", "--quiet"]
    return srlm(*argv, stdin=as_lines(rows), env=ALONE)
