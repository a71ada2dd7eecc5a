#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1.
#
# Expected: a JSON string stays a string. `load_dataset("json")` followed by `to_json` gives the values that were read.
# Seen: where every value of a field is a date ("2024-05-01"), the column becomes timestamps. The rows hold datetime objects, and
# `to_json` writes 1714521600000, milliseconds since 1970. Fields are judged apart: of a preference pair `chosen` can stay text while
# `rejected` becomes a date. One value that is no date keeps the whole column as text, so the type depends on the other rows.
#
# Consequence: preference pairs about dates ("When was ...?") that go through datasets once come back with numbers for replies, without
# a word. `features=` with strings does not help: the text is then "2024-05-01 00:00:00", made from the timestamp. Reading the file
# line by line, or one value that is no date, does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
from datasets import Features, Value, load_dataset

names = ("prompt", "chosen", "rejected")
rows = [("Which day was it?", "2024-05-01", "2023-05-01"), ("And then?", "2024-06-01", "I do not know.")]
Path("pairs.jsonl").write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))


def through(**options):
    """Return the types of the columns, and the first row after it was loaded and written again."""
    loaded = load_dataset("json", data_files="pairs.jsonl", split="train", **options)
    loaded.to_json("again.jsonl")
    return [loaded.features[name].dtype for name in names], json.loads(Path("again.jsonl").read_text().splitlines()[0])


types, first = through()
kept_types, kept = through(features=Features({name: Value("string") for name in names}))
print(f"datasets {datasets.__version__}: {types}, written again: {first}; with features: {kept}", file=sys.__stdout__)
before = dict(zip(names, rows[0]))
sys.exit(
    (types, first, kept_types, kept)
    != (["string", "timestamp[s]", "string"], {**before, "chosen": 1714521600000}, ["string"] * 3,
        {**before, "chosen": "2024-05-01 00:00:00"})
)
PYTHON
