"""What the writer of an unknown word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
