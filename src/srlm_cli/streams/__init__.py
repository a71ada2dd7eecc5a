"""What goes in and out of a command: rows (reader, writer) and words for people (console)."""
