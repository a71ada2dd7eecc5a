"""srlm make-pairs: the command, its work in several processes, and the options that read the input twice."""

from srlm_cli.commands.make_pairs.command import app as app
