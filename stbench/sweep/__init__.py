"""Many runs: suites, a resumable queue, executors and a live monitor.

Starts `stbench run` in child processes. Must not import training code.
"""
