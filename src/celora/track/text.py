"""How a number is written, in lines, tables and reports alike; what is missing is written as a dash."""

MISSING = "–"
HARMED = "▼"
"""Beside the lift of a client that is below its local-only twin: seen without colours, too."""


def score(value: float | None) -> str:
    """A score, three places.

    >>> score(0.8125), score(None)
    ('0.812', '–')
    """
    return MISSING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference of scores, with its sign.

    >>> signed(0.0312), signed(0.0)
    ('+0.031', '+0.000')
    """
    return MISSING if value is None else f"{value:+.3f}"


def lift(value: float | None) -> str:
    """A lift; below zero it is marked.

    >>> lift(0.0312), lift(-0.0004)
    ('+0.031', '▼ -0.000')
    """
    return f"{HARMED} {signed(value)}" if value is not None and value < 0 else signed(value)


def share(value: float | None) -> str:
    """A share as a percentage.

    >>> share(0.125), share(0.0)
    ('12 %', '0 %')
    """
    return MISSING if value is None else f"{100 * value:.0f} %"


def size(count: float | None) -> str:
    """Bytes, in binary units.

    >>> size(0), size(6144), size(160 * 2**20), size(None)
    ('0 B', '6.0 KiB', '160.0 MiB', '–')
    """
    if count is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """A span of time.

    >>> duration(12.44), duration(161), duration(7384)
    ('12.4s', '2m41s', '2h03m')
    """
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def printable(text: object) -> str:
    """One line without control characters: names come from files, and a terminal obeys escape sequences.

    >>> printable("site\\x1b[31m-a")
    'site\\\\x1b[31m-a'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
