"""The options that commands declare in common."""
