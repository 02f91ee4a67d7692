"""Interfaces and shared mechanisms: Backbone, Objective, Recipe; errors, registry, random numbers, FLOPs,
files and devices.

Must not import any other package of stbench. This file imports nothing, so that `stbench --help` and
`stbench compare` start without torch.
"""
