"""`python -m srlm_cli`."""

from srlm_cli.cli import main

main()
