"""Data sets: the embedded digits, image sources, prepared shards and their preparation.

Knows `stbench.core` and `stbench.models`; knows no run specification, training or evaluation.
"""
