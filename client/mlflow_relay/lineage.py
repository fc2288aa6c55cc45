"""What a rank may say of the run's ancestry. Pure; all the rest of lineage is the daemon's."""

from __future__ import annotations

RESUME_MODES = ("child", "same")
_HEX_DIGITS = frozenset("0123456789abcdef")


def checked_lineage(resume: str | None, resume_mode: str, fork: str | None) -> dict[str, str]:
    """Return the fields that go into the session's card.

    Raises: TypeError, ValueError: not an id, or another mode; names what was given.
    """
    if resume_mode not in RESUME_MODES:
        raise ValueError(f"resume_mode={resume_mode!r}: one of {', '.join(RESUME_MODES)}")
    if resume_mode == "same" and fork is not None and resume is not None:
        raise ValueError(
            'fork together with resume_mode="same": a run that goes on as itself cannot start '
            'from other weights; leave one out, or use resume_mode="child"'
        )
    return {
        "resume": "" if resume is None else run_id("resume", resume),
        "resume_mode": resume_mode,
        "fork": "" if fork is None else run_id("fork", fork),
    }


def run_id(name: str, given: object) -> str:
    """Return the id in its one spelling. Raises: TypeError, ValueError: it is none."""
    if not isinstance(given, str):
        raise TypeError(f"{name}={given!r} is a {type(given).__name__}; a run id is a str")
    digits = given.strip().lower().replace("-", "")
    if len(digits) != 32 or not _HEX_DIGITS.issuperset(digits):
        raise ValueError(
            f"{name}={given!r} is no run id: 32 hex digits are, such as Run.run_id or the id in "
            "the address of MLflow's page of the run"
        )
    return digits
