"""The exceptions for mistakes that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: what was expected, what was found, and what to type next. The command line prints
    it without a traceback.
    """


class UnsupportedError(UserError):
    """A recipe that does not work with a backbone or an objective; `stbench sweep --recipe all` skips it."""
