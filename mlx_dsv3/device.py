"""The device that MLX computes with: its kind, its dtype, its memory, its limits.

Metal was never run by this project, nor MLX's CUDA backend: what is asked of them here is what
their sources answer.
"""

import os
from pathlib import Path

import mlx.core as mx

BUFFER_CACHE_BYTES = 1 << 30  # freed buffers that MLX may keep on a GPU
MOST_WIRED_SHARE = 0.95  # of a Mac's memory, that its GPU can be allowed


def is_gpu() -> bool:
    """Say whether MLX computes on a GPU, Apple's or another."""
    return mx.default_device().type == mx.gpu


def has_metal() -> bool:
    """Say whether this is a Mac, whose GPU and CPU share one memory."""
    return mx.metal.is_available()


def default_dtype() -> mx.Dtype:
    """Return bfloat16 on a GPU, float32 on a CPU (there bfloat16 is about ten times slower)."""
    return mx.bfloat16 if is_gpu() else mx.float32


def available_bytes() -> int:
    """Return what a model may use: Metal's recommended working set, else what memory is free.

    The latter is a GPU's, or the system's as `system_free_bytes` counts it.
    """
    if has_metal():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    if is_gpu():
        return int(mx.device_info(mx.gpu)["free_memory"])
    free = system_free_bytes()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if free is None else free


def system_free_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that Linux would still give this process, None where it does not say.

    That is the least of what the machine has (`MemAvailable`, in which pages of files that may be
    dropped are counted) and of what is left of the limit of each control group around the process,
    version 1 or 2, up to the outermost that can be seen. Of what a group uses, its pages of files
    read once and not lately (`inactive_file`) are left out: a model that was just converted is
    such pages, and so are experts read from disk. Files are looked up below `root`.
    """
    found = [group_free_bytes(folder) for folder in control_groups(root)]
    meminfo = fields_of(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        found.append(1024 * meminfo["MemAvailable:"])
    return min((free for free in found if free is not None), default=None)


def control_groups(root: Path) -> list[Path]:
    """Return the folders of the memory control groups around this process, with their parents.

    A container may see itself under the path that it has outside: what is not there is harmless.
    """
    base, found = root / "sys/fs/cgroup", []
    for line in read_lines(root / "proc/self/cgroup") or ["0::/", "1:memory:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = base / "memory" if controllers else base  # version 2 names none
        names = [part for part in path.split("/") if part not in ("", "..")]
        found += [mount.joinpath(*names[:i]) for i in range(len(names) + 1)]
    return found


def group_free_bytes(folder: Path) -> int | None:
    """Return what is left of a control group's limit, None where it has none."""
    limits, used = ("memory.max", "memory.high"), "memory.current"
    cached = "inactive_file"
    if (folder / "memory.limit_in_bytes").is_file():
        limits, used, cached = (
            ("memory.limit_in_bytes",),
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    bounds = [number_in(folder / name) for name in limits]
    bounds = [bound for bound in bounds if bound is not None]
    if not bounds:
        return None
    taken = (number_in(folder / used) or 0) - fields_of(folder / "memory.stat").get(cached, 0)
    return max(min(bounds) - max(taken, 0), 0)


def number_in(path: Path) -> int | None:
    """Return the number that a file holds, None for a missing file or a word (`max`)."""
    words = " ".join(read_lines(path)).split()
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def fields_of(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines `name number ...`, by name."""
    rows = [line.split() for line in read_lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def read_lines(path: Path) -> list[str]:
    """Return the lines of one of the system's files, none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def most_wired_bytes() -> int:
    """Return the memory that a Mac's GPU can be allowed at most, by `sysctl`; 0 elsewhere."""
    return int(MOST_WIRED_SHARE * mx.device_info(mx.gpu)["memory_size"]) if has_metal() else 0


def buffer_cache_bytes() -> int:
    """Return what MLX may keep of freed buffers, once `limit_memory` was called."""
    return BUFFER_CACHE_BYTES if has_metal() or is_gpu() else 0


def limit_memory() -> None:
    """Set MLX's limits for this process, where a GPU's memory is in question."""
    if has_metal():  # without it macOS pages weights out: up to 88 times slower
        mx.set_wired_limit(available_bytes())
    if nbytes := buffer_cache_bytes():
        mx.set_cache_limit(nbytes)
