"""stbench: one protocol under which feature-supervision recipes for diffusion transformers are compared."""

__version__ = "0.1.0"
