"""srlm whose echo engine sends its own process a signal: `mortal_srlm.py AFTER SIGNAL srlm-arguments...`.

The engine takes a little time for each completion and checkpoints are written often, so that a kill
finds rows before, at and behind the last checkpoint. AFTER 0 never dies by itself.
"""

import os
import sys
import time

from srlm_cli.cli import main
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.streams import writer

after, sign = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["srlm", *sys.argv[3:]]
writer.SECONDS_BETWEEN_CHECKPOINTS = 0.01
generate = EchoEngine.generate
done = 0


def mortal(self, requests):
    """Generate as the echo engine does, slowly, up to the end of this life."""
    global done
    for completion in generate(self, requests):
        if after and done >= after:
            os.kill(os.getpid(), sign)
        done += 1
        time.sleep(0.006)
        yield completion


EchoEngine.generate = mortal
main()
