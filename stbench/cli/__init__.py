"""The `stbench` command: one file per subcommand, with its options and what it does.

Files of this package import heavy packages (torch, timm, mmengine, ...) inside functions only, because all of
them are loaded for `stbench --help`, shell completion, `compare` and `show`. The exceptions are files that
other files of this package import inside functions: progress.
"""
