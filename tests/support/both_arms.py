"""What the tests of examples with a control share: replies checked by their rules, and a run of both arms to M3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers import FORKED, clean_env, read_rows
from srlm_cli.rules import check_reply, rules_of_row
from tiny import tiny_model

MODELS = ("own/M0", "own/M1", "own/M2", "own/M3", "control/M2", "control/M3")
BRIEF = {
    "SRLM_SAMPLE_LIMIT": "4",
    "SRLM_SAMPLE_MAX_NEW_TOKENS": "8",
    "SRLM_JUDGE_LIMIT": "8",
    "SRLM_JUDGE_MIN_SCORE_MASS": "0",  # a tiny model writes anything
    "SRLM_MAKE_EFT_LIMIT": "4",
    "SRLM_SFT_MAX_STEPS": "1",
    "SRLM_SFT_MAX_LENGTH": "2048",  # the letters of a tiny model are tokens
    "SRLM_DPO_MAX_LENGTH": "2048",
    "SRLM_DPO_MAX_STEPS": "1",
}


def keeps(text: str, rules: list[str]) -> bool:
    """Return whether a reply keeps all rules."""
    row = {"response": text, "rules": rules}
    return set(check_reply(row, rules_of_row(row)).values()) == {True}


def run_to_m3(example: Path, folder: Path, targets: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Path:
    """Run both arms of an example with a tiny model; check what both have, and return the folder of the run."""
    out, m0 = folder / "out", tiny_model(folder / "m0")
    made = [f"SRLM={' '.join(FORKED)}", f"PYTHON={sys.executable}", f"M0={m0}", f"OUT={out}"]
    environment = {**clean_env(), **BRIEF, **(env or {})}
    done = subprocess.run(
        ["make", "-C", example, *targets, *made], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "What was learned" in done.stdout and "rules kept, control" in done.stdout
    for model in MODELS:
        assert rules_kept(out / model / "eval-rules.jsonl") == [16]
    shuffled, own = (read_rows(out / arm / "M1" / "pairs.jsonl") for arm in ("control", "own"))
    assert all("shuffled_labels" in row for row in shuffled) and not any("shuffled_labels" in row for row in own)
    assert {row["id"] for row in shuffled} == {row["id"] for row in own} and own
    model = json.loads((out / "control" / "M3" / "model" / "provenance.json").read_text())
    assert model["from"]["model"].endswith("control/M2/model")
    return out


def rules_kept(path: Path) -> list[int]:
    """Return how many replies the row `rules_kept` over all rules counts."""
    return [row["n"] for row in read_rows(path) if row["metric"] == "rules_kept" and "rule" not in row]
