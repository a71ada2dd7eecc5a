#!/usr/bin/env bash
# rich 15.0.0.
#
# Expected: a progress bar whose steps are equally long shows the time that is left, however long a step is.
# Seen: with a step every 29 seconds it does; with a step every 31 seconds it has no speed and no time left, after ten steps as
# after a hundred. Samples that are older than `speed_estimate_period` (30 seconds) are thrown away, and a speed needs two.
#
# Consequence: the bar of a long training or of large batches, where a time left is wanted most, shows "-:--:--" from the first to
# the last step. `Progress(speed_estimate_period=...)` has to be several times as long as a step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rich==15.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from rich.progress import Progress


def left_after(steps: int, seconds: float, **settings: float) -> float | None:
    """Return the seconds that a bar of 200 steps says are left after some of them, by a clock of our own."""
    clock = iter(at * seconds for at in range(1000))
    now = next(clock)
    bar = Progress(get_time=lambda: now, auto_refresh=False, **settings)
    task = bar.add_task("train", total=200)
    for _ in range(steps):
        now = next(clock)
        bar.update(task, advance=1)
    return bar.tasks[0].time_remaining


seen = {
    "10 steps of 29 s": left_after(10, 29),
    "10 steps of 31 s": left_after(10, 31),
    "100 steps of 31 s": left_after(100, 31),
    "10 steps of 31 s, period 300 s": left_after(10, 31, speed_estimate_period=300),
}
print(f"rich {version('rich')}: seconds left of 200 steps after {seen}")
sys.exit(list(seen.values()) != [190 * 29, None, None, 190 * 31])
PYTHON
