"""srlm that kills itself with SIGKILL in a training step: `mortal_training.py AFTER srlm-arguments...`."""

import os
import signal
import sys

import transformers

from srlm_cli.cli import main

after = int(sys.argv[1])
sys.argv = ["srlm", *sys.argv[2:]]
step = transformers.Trainer.training_step
done = 0


def mortal(self, *args, **named):
    """Train on one micro-batch, up to the end of this life."""
    global done
    if done >= after:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return step(self, *args, **named)


transformers.Trainer.training_step = mortal
main()
