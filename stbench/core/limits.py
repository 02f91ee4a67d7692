"""Upper limits of options. They are far beyond any use and only catch typing errors. Imports nothing."""

from __future__ import annotations

LARGEST = 1e18
"""Real numbers, such as a learning rate or the weight of a loss."""
MAX_STEPS = 1_000_000_000
"""Optimiser steps."""
MAX_SAMPLER_STEPS = 10_000
MAX_BATCH = 1_000_000
MAX_SAMPLES = 10_000_000
"""Generated images."""
MAX_SEED = (1 << 63) - 1
MAX_SEEDS = 1000
"""Seeds of one sweep."""
MAX_RUNS = 10_000
"""Runs of one sweep."""
MAX_JOB_GPUS, MAX_JOB_NODES = 4096, 512
"""GPUs and nodes of one run on a cluster."""
MAX_DEPTH = 1000
MAX_WIDTH = 65_536
MAX_PIXELS = 16_384
"""Height and width of images."""
MAX_GUIDANCE = 1000.0
MAX_NAME = 4096
"""Characters of a name or a path."""
MAX_ITEMS = 10_000
"""Items of a list, such as evaluation points."""

MAX_RANKS = 1024
"""Processes on one machine that a command starts."""
