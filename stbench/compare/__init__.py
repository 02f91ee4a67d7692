"""From run records to leaderboards: rows, budgets, verdicts, tables, figures.

Reads records through `stbench.runs`; uses no torch and never opens a checkpoint.
"""
