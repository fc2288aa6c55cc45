"""Benchmarks: this project and its peers side by side, in one run on one machine.

`make bench` runs all cases and writes docs/benchmarks.md; `make bench QUICK=1` takes under three
minutes, writes nothing, and fails where a ratio fell behind its bound. What is compared runs by
turns, so that a machine with other work slows all of them alike.
"""
