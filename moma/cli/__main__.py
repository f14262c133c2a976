"""`python -m moma.cli`, as torchrun starts it."""

from moma.cli import main

main()
