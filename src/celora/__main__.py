"""`python -m celora` is the command `celora`."""

from celora.cli import main

main()
