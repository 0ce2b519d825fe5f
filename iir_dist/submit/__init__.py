"""Commands of `iir` as jobs on a Ray cluster: check the command line here, pack what it needs, submit, follow."""
