"""How many judgements `judge --num-judgements LOW:HIGH --settle P` saves, and what they cost in agreement.

    python benchmarks/settle.py [--prompts 300] [--replies 4] [--settle 0.9]

The judge is simulated: replies have a known quality, and each score is the quality with noise, rounded to 0 to 5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from simulated_judge import SimulatedJudge, accuracy, ends, replies  # noqa: E402
from srlm_cli import templates  # noqa: E402
from srlm_cli.engines.base import Sampling  # noqa: E402
from srlm_cli.stages.judge import JudgeOptions, judge  # noqa: E402
from srlm_cli.stages.settle import SettleOptions, judge_until_settled  # noqa: E402

# noise of a score, spread of the qualities of a prompt
CASES = ((1.0, 1.0), (0.5, 1.0), (1.5, 1.0), (1.0, 0.5), (0.0, 1.0))
MOST = 9


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--replies", type=int, default=4)
    parser.add_argument("--settle", type=float, default=0.9)
    given = parser.parse_args()
    template = templates.load_judge("additive")
    for noise, spread in CASES:
        rows, quality = replies(given.prompts, spread, given.replies)

        def fixed(count: int, rows: Any = rows, quality: Any = quality, noise: float = noise) -> list[Any]:
            options = JudgeOptions(template, count, Sampling(), 0)
            return [row for out in judge(rows, SimulatedJudge(quality, noise), options) for row in out.rows]

        settle = SettleOptions(template, MOST, Sampling(), 0, settle=given.settle)
        found = [row for out in judge_until_settled(rows, SimulatedJudge(quality, noise), settle) for row in out.rows]
        whole = fixed(MOST)
        print(f"noise {noise}, spread {spread}:")
        for name, made in ((f"2:{MOST}", found), (f"K={MOST}", whole), ("K=3", fixed(3))):
            share = sum(len(row["scores"]) for row in made) / (MOST * len(rows))
            alike = fmean(one == other for one, other in zip(ends(made), ends(whole), strict=True))
            print(f"  {name}: {share:.2f} of the judgements, accuracy {accuracy(made, quality):.1%}, "
                  f"best and worst of K={MOST} for {alike:.0%} of the prompts")  # fmt: skip


if __name__ == "__main__":
    main()
