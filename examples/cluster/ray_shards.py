"""Sample and judge shards as Ray tasks; a task of a lost node is run again and goes on from its last finished row.

python ray_shards.py --prompts M1/prompts.jsonl --out M1/shards --shards 64 --gpus 2 -- --model M1/model
bash join.sh M1/shards 64 M1

What stands behind `--` goes to `srlm sample` and `srlm judge`. All nodes see the files under the same names.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import ray


def run_shard(prompts: str, out: str, shard: int, shards: int, options: list[str]) -> str:
    """Make the responses and the judged rows of one shard, if they are not there yet; return the last file."""
    responses, judged = (Path(out) / f"{kind}-{shard:05d}.jsonl" for kind in ("responses", "judged"))
    if not responses.exists():
        part = ["--in", prompts, "--shard", f"{shard}/{shards}"]
        subprocess.run(["srlm", "sample", *options, *part, "--out", str(responses)], check=True)
    if not judged.exists():
        subprocess.run(["srlm", "judge", *options, "--in", str(responses), "--out", str(judged)], check=True)
    return str(judged)


def main() -> None:
    """Run all shards, as many at a time as the cluster has GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of one task.")
    parser.add_argument("options", nargs="*", help="Options of sample and judge, behind --.")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    ray.init()
    task = ray.remote(num_gpus=given.gpus, max_retries=3, retry_exceptions=True)(run_shard)
    rest = [given.prompts, given.out]
    waiting = [task.remote(*rest, shard, given.shards, given.options) for shard in range(1, given.shards + 1)]
    while waiting:
        done, waiting = ray.wait(waiting)
        print(f"{ray.get(done[0])} is complete, {len(waiting)} shards to go", flush=True)


if __name__ == "__main__":
    main()
