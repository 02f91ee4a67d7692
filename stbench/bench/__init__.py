"""The speed of the training step: throughput, phases, memory, and the ratio to a plain loop.

Run by `stbench bench`.
"""
