"""Bytes in words."""

GB = 10**9


def gigabytes(nbytes: float) -> str:
    """Return a size for people: one decimal, three digits below 1 GB."""
    value = nbytes / GB
    return f"{value:.1f} GB" if value >= 1 else f"{value:.3g} GB"


def round_up(nbytes: int) -> str:
    """Return gigabytes to three digits, never less than `nbytes`."""
    value = nbytes / GB
    digits = f"{value:.3g}"
    return digits if float(digits) >= value else f"{value * 1.01:.3g}"


def round_down(nbytes: int) -> str:
    """Return gigabytes to three digits, never more than `nbytes`."""
    value = nbytes / GB
    digits = f"{value:.3g}"
    return digits if float(digits) <= value else f"{value * 0.99:.3g}"


def size(nbytes: float) -> str:
    """Return bytes in GB with one decimal, or in MB where that would say nothing."""
    return f"{nbytes / GB:.1f} GB" if nbytes >= GB else f"{nbytes / 1e6:.1f} MB"
