"""What every benchmark says of the machine it ran on: printed first, and part of its JSON line."""

import json
import os
import platform

import mlx.core as mx


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
