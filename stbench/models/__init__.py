"""Building blocks of networks: layers, alignment losses and heads, encoders, autoencoders, weight files,
official checkpoints and export.

Knows the interfaces of `stbench.core` only; knows no run, data set or recipe.
"""
