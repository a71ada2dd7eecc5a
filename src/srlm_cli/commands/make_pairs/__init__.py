"""srlm make-pairs: the command, and what it does beside one pass over its input."""

from srlm_cli.commands.make_pairs.command import app as app
