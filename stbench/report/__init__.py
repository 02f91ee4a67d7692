"""The comparison as one HTML page: leaderboard, curves, samples and runs. Needs no torch.

Owns how a leaderboard and its records look in a browser, and the local server that shows the page while runs
train. It computes no value: numbers and verdicts come from `compare`. It must not know how runs are made.
"""
