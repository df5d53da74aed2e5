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
    """Return what a model may use: Metal's recommended working set, else what memory is free."""
    if has_metal():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    if is_gpu():
        return int(mx.device_info(mx.gpu)["free_memory"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (limit := group.read_text().strip()).isdigit():
        free = min(free, int(limit))
    return free


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
