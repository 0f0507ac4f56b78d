"""Straightforward readings of the papers, to compare with: clear, correct, and in no hurry.

They share no code with the package's runtime. `ttrouting bench` measures against them, the tests compare results.
"""
