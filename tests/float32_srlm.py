"""The program, whose trainings are float32 on any CPU: their losses can then be compared closely."""

from srlm_cli import models
from srlm_cli.cli import main

models.has_bfloat16 = lambda device: False
main()
