"""Data sets: the embedded digits, prepared shards, image files, and their preparation.

May import `stbench.core` and `stbench.models`. Does not know run specifications, training or evaluation.
"""
