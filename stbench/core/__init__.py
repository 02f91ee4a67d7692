"""Interfaces and shared mechanisms: Backbone, Objective, Supervision, Stage; errors, registry, random
numbers, FLOPs, files and devices.

Imports nothing else of stbench. This file imports nothing, so that `stbench --help` and `compare` start
without torch.
"""
