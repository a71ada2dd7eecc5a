"""srlm judge: the command, its modes, and what those that ask a model have in common."""

from srlm_cli.commands.judge.command import app as app
from srlm_cli.commands.judge.rows import judgeable as judgeable
from srlm_cli.commands.judge.rows import of_one_writer as of_one_writer
