"""Compare runs: group records into rows and tables, choose budgets, give verdicts, print and plot the result.

Reads records through `stbench.runs`. Does not import torch and never opens a checkpoint.
"""
