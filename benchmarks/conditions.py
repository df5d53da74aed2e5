"""What every benchmark says of the machine it ran on: printed first, and part of its JSON line."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

SETTLE_S = 1.0  # until a process that counts takes its share


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with a process that counts."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(SETTLE_S)
            yield
        finally:
            process.kill()


def print_conditions(**more) -> dict:
    """Print and return machine, load, versions and BLAS, and what the benchmark adds."""
    conditions = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
        "blas": "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "MLX's own",
        **more,
    }
    print(json.dumps(conditions))
    return conditions
