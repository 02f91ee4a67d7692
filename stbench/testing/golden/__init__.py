"""Checks against numbers made by the published implementations."""
