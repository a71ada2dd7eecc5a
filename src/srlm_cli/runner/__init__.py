"""What runs a command: streams in and out, counts, provenance, exit codes."""
