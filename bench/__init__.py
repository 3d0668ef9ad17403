"""The figures that the project shows, each measured by a module of its own; `make bench` runs them all.

A module has `measure(progress, effort) -> Section` and can be run alone: `python -m bench.overhead`.
"""
