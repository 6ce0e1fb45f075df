"""The command line: a file a sub-command, each with a function `command`, collected in `milora_cli.main`."""
