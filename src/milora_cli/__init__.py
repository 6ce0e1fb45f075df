"""The command line: one file per sub-command, each with a function `command`; `milora_cli.main` collects them."""
