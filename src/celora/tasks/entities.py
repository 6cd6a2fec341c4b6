"""Entities in a sequence of tags, by the rule of CoNLL's `conlleval`, which seqeval follows, too.

Tags are `O`, outside, or a type behind B-, I-, E- or S-; a tag without such a mark is a type by itself. Neighbours of
one type are one entity, unless a mark says that one ends (E-, S-) or another begins (B-, S-). So an entity that begins
with I- counts as one (E. Tjong Kim Sang and F. De Meulder, CoNLL-2003).
"""

from collections.abc import Sequence

OUTSIDE = "O"
Entity = tuple[str, int, int]
"""Its type, its first word, and the one after its last."""


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one row.

    >>> sorted(entities(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('ORG', 5, 6), ('PER', 0, 2)]
    """
    found = set[Entity]()
    start, before, kind = 0, OUTSIDE, ""
    for at, tag in enumerate([*tags, OUTSIDE]):
        mark, of = _parts(tag)
        if before != OUTSIDE and (mark in (OUTSIDE, "B", "S") or before in ("E", "S") or of != kind):
            found.add((kind, start, at))
            before = OUTSIDE
        if before == OUTSIDE:
            start = at
        before, kind = mark, of
    return found


def _parts(tag: str) -> tuple[str, str]:
    """(mark, type)."""
    mark, dash, of = tag.partition("-")
    if tag == OUTSIDE or (dash and mark in ("B", "I", "E", "S")):
        return mark, of
    return "I", tag
