"""Faults by the thousand; see "Development" in README. Not part of the tests that pytest collects.

Each module is a program: ``python -m tests.soak.kills 1000 --seed 1``.
"""
