"""Did you mean ...?"""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(word: str, options: Collection[str]) -> str:
    """`; nearest: a, b` and all options when they are few; to be put behind a message."""
    known = sorted(options)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    listed = ", ".join(known) if len(known) <= 13 else ""
    return (f"; nearest: {', '.join(close)}" if close else "") + (f"; there are: {listed}" if listed else "")
