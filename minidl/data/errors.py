"""What can be wrong with a data file."""

from __future__ import annotations


class DataError(ValueError):
    """A file that is truncated, damaged, or not what its place says; the message names it."""


class MissingDataError(DataError, FileNotFoundError):
    """Files that are not there; the message says where they were sought and how to get them."""
