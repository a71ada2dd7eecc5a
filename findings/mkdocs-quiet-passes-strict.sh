#!/usr/bin/env bash
# MkDocs 1.6.1: `mkdocs build --strict --quiet` exits 0 with a broken link. Strict mode counts the warnings that are
# logged, and --quiet raises the log level above warnings, so none are counted. Without --quiet the same site exits 1.
# Exits non-zero when this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet mkdocs==1.6.1 2>/dev/null
venv/bin/mkdocs --version
mkdir docs
echo 'site_name: test' > mkdocs.yml
echo '[a link](missing.md)' > docs/index.md

loud=0; venv/bin/mkdocs build --strict > loud.txt 2>&1 || loud=$?
quiet=0; venv/bin/mkdocs build --strict --quiet > quiet.txt 2>&1 || quiet=$?
echo "--strict:         exit $loud, $(grep -c WARNING loud.txt || true) warning: $(grep WARNING loud.txt | head -n 1)"
echo "--strict --quiet: exit $quiet, $(wc -c < quiet.txt) bytes of output"
[ "$loud" = 1 ] && [ "$quiet" = 0 ] && [ ! -s quiet.txt ]
