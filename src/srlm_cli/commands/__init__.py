"""The subcommands, one thin file each: parse, open, call one function, report, exit."""
