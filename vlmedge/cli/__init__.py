"""The command line: `vlmedge.cli.app` has the commands, each command its own file."""
