"""What can go wrong in a rank, and be said to it.

    RelayError
    ├── LaunchError      who am I? rank, node or run key cannot be told; says what to pass
    ├── JournalError     start_run cannot make its journal (no space, no permission)
    └── FormatError      bytes that are no record, frame or message of ours
        └── VersionError ... of a version that this release does not read

A wrong argument of a log call raises the TypeError or ValueError that Python users expect. Failures
of daemon and server are never raised in training.
"""

from __future__ import annotations


class RelayError(Exception):
    """The root of all errors of this package."""


class LaunchError(RelayError):
    """Rank, node or run key cannot be told from arguments and environment."""


class JournalError(RelayError):
    """The journal cannot be made: without it nothing could be promised."""


class FormatError(RelayError):
    """Bytes that are no record, frame or message."""


class VersionError(FormatError):
    """A version that this release does not know."""
