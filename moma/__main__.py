"""`python -m moma`, as torchrun starts it."""

from moma.cli import main

main()
