"""Errors a user can cause. The command line prints them as one sentence and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""

    exit_code = 2


class RunFailed(Exception):
    """A run that started correctly and could not go on (divergence, failed self-check). Exit code 1."""

    exit_code = 1


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` for the closest known word, with the `prefix` it is written with, or a short list of what there is."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known: {shown}" if known else ""
