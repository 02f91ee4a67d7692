"""The training step, the stage loop and the run: everything that changes a weight.

Names no recipe and no backbone.
"""
