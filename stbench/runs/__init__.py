"""Run folders on disk: records, their schema, the folder itself and the sweep journal.

Uses no torch. This file imports nothing.
"""
