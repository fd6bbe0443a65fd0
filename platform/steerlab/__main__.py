"""`python -m steerlab` is `steerlab`."""

from steerlab.cli import main

main()
