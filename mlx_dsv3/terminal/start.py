"""What is said before the first question: the memory plan, and how fast experts can be read."""

from mlx_dsv3.load import Loaded
from mlx_dsv3.memory import DEFAULT_CONTEXT, MemoryPlan
from mlx_dsv3.sizes import gigabytes

SLOW_DISK = 0.5e9  # bytes per second: an external or network disk
LEAST_PROBED = 64 << 20  # bytes: fewer say nothing about a disk


def print_plan(plan: MemoryPlan) -> None:
    """Print the table of `--plan`."""
    for what, nbytes, remark in plan.rows():
        print(f"{what:<14}{gigabytes(nbytes):>12}   {remark}")
    print(f"{'together':<14}{gigabytes(plan.total_bytes):>12}")
    print(f"{'allowed':<14}{gigabytes(plan.limit_bytes):>12}   on this machine, now")


def start_lines(loaded: Loaded, asked: int | None) -> list[str]:
    """Return what a person could not expect: less context than by default, or experts on disk."""
    usual, lines = min(DEFAULT_CONTEXT, loaded.args.max_position_embeddings), []
    if asked is None and loaded.plan.context < usual:
        lines = [f"memory allows a context of {loaded.plan.context:,} tokens"]
    return lines + (streaming_lines(loaded) if loaded.store.is_streamed else [])


def streaming_lines(loaded: Loaded) -> list[str]:
    """Return how experts are streamed and what the disk allows, measured now."""
    store, (speed, nbytes) = loaded.store, loaded.store.probe()
    lines = [
        f"experts {loaded.plan.experts_words} in memory; the folder reads at "
        f"{speed / 1e9:.2f} GB/s, so a token takes {store.token_bytes / speed:.2g} s of reading "
        "if none of its experts is in memory"
    ]
    if speed < SLOW_DISK and nbytes >= LEAST_PROBED:
        lines.append(
            "hint: that is slow for experts; copy the folder to an internal disk, or give "
            "`--expert-memory` more"
        )
    return lines
