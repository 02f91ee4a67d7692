"""Many runs: suites, the queue, executors and the live monitor.

Starts `stbench run` in child processes; trains nothing itself.
"""
