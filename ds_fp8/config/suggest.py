"""Did you mean: the known word nearest to an unknown one.

Distance is counted in single-letter insertions, deletions, replacements and swaps of neighbours (optimal string
alignment), after spelling is levelled: case and the difference between `-`, `_`, `.` and a blank never count.
A word of n letters may be n // 3 away: `margn` finds `margin`, `foo` finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_SEPARATORS = str.maketrans("", "", "-_. ")


@lru_cache(maxsize=4096)
def level_spelling(word: str) -> str:
    """Lower case, without separators: `MS-AMP` and `ms_amp` are both `msamp`."""
    return word.lower().translate(_SEPARATORS)


def edit_distance(left: str, right: str) -> int:
    """Optimal string alignment distance between two words."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        two_before, before, row = before, row, [i] + [0] * len(right)
        for j, b in enumerate(right, start=1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                row[j] = min(row[j], two_before[j - 2] + 1)
    return row[-1]


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None when nothing is near."""
    known = list(known)
    levelled = level_spelling(word)
    return nearest(levelled, known, len(levelled) // 3) or completed(levelled, known)


def completed(levelled: str, known: Iterable[str], least: int = 4) -> str | None:
    """The one known word that begins or ends with `levelled` (`delay`, `level`); None if there is none, or several."""
    if len(levelled) < least:
        return None
    found = [word for word in known if level_spelling(word).startswith(levelled)]
    found = found or [word for word in known if level_spelling(word).endswith(levelled)]
    return found[0] if len(found) == 1 else None


def nearest(levelled: str, known: Iterable[str], most: int) -> str | None:
    """The known word within `most` edits of `levelled`, the nearest and then the one of equal length; None without
    one.
    """
    best: tuple[int, int, str] | None = None
    for other in known:
        spelling = level_spelling(other)
        longer = abs(len(spelling) - len(levelled))
        # Lengths and letters bound the distance from below, and cost nothing beside it.
        if longer > most or len(set(spelling) ^ set(levelled)) > 2 * most:
            continue
        found = (edit_distance(levelled, spelling), longer, other)
        if found[0] <= most and (best is None or found < best):
            best = found
    return None if best is None else best[2]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    guess = closest(word, known)
    return f"; did you mean '{guess}'?" if guess else ""
