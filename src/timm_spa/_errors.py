"""Base classes of the errors of this package."""

__all__ = ['TimmSpaError', 'UsageError']


class TimmSpaError(Exception):
    """Base class for errors that are shown to the user."""


class UsageError(TimmSpaError, ValueError):
    """Invalid argument of a function or command."""
