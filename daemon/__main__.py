"""`python -m daemon` is the `maskd` program."""

from daemon.cli import main

main()
