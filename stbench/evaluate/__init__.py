"""Image generation and everything that is computed from images.

Owns sampling from a network, the metrics and the statistics behind them, reference sets, the evaluation of
a run's checkpoints, and the sampling jobs of `stbench sample`. It must not know how a network is trained, how
runs are compared, or anything about the command line: progress is reported through callbacks.
"""
