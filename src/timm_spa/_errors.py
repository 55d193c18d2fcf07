"""The base of every error that this package raises for its readers."""

__all__ = ['TimmSpaError', 'UsageError']


class TimmSpaError(Exception):
    """Something that was asked for cannot be done; the message names it, and what to do about it."""


class UsageError(TimmSpaError, ValueError):
    """An argument is none of those that are known."""
