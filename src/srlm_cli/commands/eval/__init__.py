"""srlm eval: the group of measuring commands, each in a file of its own."""

from srlm_cli.commands.eval.head_to_head import head_to_head
from srlm_cli.commands.eval.health import health
from srlm_cli.commands.eval.judges import judges, needs
from srlm_cli.commands.eval.length_control import length_control
from srlm_cli.commands.eval.probe import probe
from srlm_cli.commands.eval.reward import reward
from srlm_cli.commands.eval.rules import rules
from srlm_cli.options.common import new_app
from srlm_cli.options.unused import command_with

app = new_app("Measure: a judge against people, one model against another.")
app.command()(reward)
app.command("head-to-head")(head_to_head)
app.command()(health)
app.command("length-control")(length_control)
app.command()(probe)
app.command(cls=command_with(needs=needs))(judges)
app.command()(rules)
