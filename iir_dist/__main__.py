"""`python -m iir_dist` is `iir`."""

from iir_dist.cli import main

main(prog_name="iir")
