"""From command-line values to a prepared run: specification, overrides, resolution, hashes, plan.

Imports nothing of training or evaluation.
"""
