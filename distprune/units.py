"""Numbers as people read them."""

UNITS = ("B", "kB", "MB", "GB", "TB")


def in_bytes(count: float) -> str:
    """Bytes in decimal units, with three digits and a space that does not break."""
    for unit in UNITS[:-1]:
        if abs(count) < 1000:
            return f"{count:.0f}\u00a0B" if unit == "B" else f"{count:.3g}\u00a0{unit}"
        count /= 1000
    return f"{count:.3g}\u00a0{UNITS[-1]}"
