"""`python -m tuner.cli` is the `tuner` command of that Python."""

from tuner.cli.commands import main

main()
