"""Feature diagnostics: what the blocks of a trained network contain, along training and against its teacher.

Owns the formulas, the collection of features and the figures of `stbench inspect`. Knows nothing of training
or of leaderboards, and no recipe or backbone by name. What it writes is read by `stbench.runs.inspection`.
"""
