#!/usr/bin/env bash
# dataclasses of Python 3.11, attrs 26.1.0.
#
# Expected: asdict copies a field that is a Counter, with its keys and counts, as it copies a dict or an OrderedDict.
# Seen: dataclasses.asdict gives the pairs of the Counter to the class of the field. A Counter counts what it is given, so each
# pair (key, count) becomes a key with the count 1. Nothing is raised. attrs.asdict returns a plain dict with the counts.
#
# Consequence: a report with a Counter has wrong counts, and cannot be written as JSON, whose keys may not be tuples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet attrs==26.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import dataclasses
import sys
from collections import Counter, OrderedDict
from typing import Any

import attrs


@dataclasses.dataclass
class Plain:
    kept: Any


@attrs.define
class Attrs:
    kept: Any


counts = {"drops": 3, "rows": 5}
copied = dataclasses.asdict(Plain(Counter(counts)))["kept"]
ordered = dataclasses.asdict(Plain(OrderedDict(counts)))["kept"]
theirs = attrs.asdict(Attrs(Counter(counts)))["kept"]
print(f"Python {sys.version.split()[0]}: dataclasses makes {dict(copied)} of a Counter, {dict(ordered)} of an OrderedDict")
print(f"attrs: {type(theirs).__name__} {theirs}")
sys.exit(not (copied == {("drops", 3): 1, ("rows", 5): 1} and ordered == counts and theirs == counts and type(theirs) is dict))
PYTHON
