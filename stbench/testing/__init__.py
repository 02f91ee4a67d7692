"""The public conformance suite: golden numbers, and checks for backbones and recipes."""
