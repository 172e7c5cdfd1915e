"""`python -m fraqat`."""

from fraqat.cli import main

main()
