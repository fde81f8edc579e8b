"""Run the whole engine in virtual time, from a seed, among faults; ``python -m tests.simulation --help``."""
