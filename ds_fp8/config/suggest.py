"""Did you mean: the known word nearest to an unknown one.

Distance is counted in single-letter insertions, deletions, replacements and swaps of neighbours (optimal string
alignment), after spelling is levelled: case and the difference between `-`, `_`, `.` and a blank never count.
A word of n letters may be n // 3 away: `margn` finds `margin`, `foo` finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

_SEPARATORS = str.maketrans("", "", "-_. ")


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
    levelled = level_spelling(word)
    ranked = sorted((edit_distance(levelled, level_spelling(other)), other) for other in known)
    if ranked and ranked[0][0] <= len(levelled) // 3:
        return ranked[0][1]
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    guess = closest(word, known)
    return f"; did you mean '{guess}'?" if guess else ""
