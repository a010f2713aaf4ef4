"""`python -m align.cli` is the command `align`."""

from align.cli.main import main

main()
