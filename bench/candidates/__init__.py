"""Candidates: kernels that nothing in the package launches, checked and timed here.

A candidate moves into the package once a measurement shows where it wins. Until then its device code, its
launches and its rows of codegen.csv live in the benchmark, and `bench run --providers` runs it by name.
"""
