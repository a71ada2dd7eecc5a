"""`python -m srlm_cli`."""

from srlm_cli.cli import main

if __name__ == "__main__":  # a worker process of an engine imports this file too
    main()
