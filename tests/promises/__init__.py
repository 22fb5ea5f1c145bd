"""Prove the promises of README.rst by breaking things for real, more often with `--soak`."""
