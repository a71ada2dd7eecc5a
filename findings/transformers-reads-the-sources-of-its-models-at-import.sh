#!/usr/bin/env bash
# transformers 5.23.0, Python 3.11.
#
# Expected: `import transformers` is lazy, so the files of a model are read when a class of that model is asked for.
# Seen: the import opens the source text (not the compiled code) of 1,669 files below `transformers/models`, to find out which
# names they define, and opens all of them again when the first lazy name is asked for, here AutoTokenizer. Nothing is kept
# for the next process.
#
# Consequence: each process that uses any model pays for reading the sources of all models twice, without torch too. On a slow
# disk or a network file system this is the longest part of the start, and neither .pyc files nor a small model help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from collections import Counter

opened: Counter[str] = Counter()


def note(event: str, about: tuple) -> None:
    if event == "open" and isinstance(about[0], str) and "/transformers/models/" in about[0] and about[0].endswith(".py"):
        opened[about[0]] += 1


sys.addaudithook(note)
import transformers

at_import = sum(opened.values())
transformers.AutoTokenizer
twice = sum(count >= 2 for count in opened.values())
print(f"transformers {transformers.__version__}: {at_import} model sources opened by the import, {twice} of them again for AutoTokenizer")
sys.exit(not (at_import > 1500 and twice == len(opened)))
PYTHON
