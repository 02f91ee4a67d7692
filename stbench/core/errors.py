"""The one error a user can cause."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can fix; the message is one line: what was expected, what was found, what to type
    next.
    """
