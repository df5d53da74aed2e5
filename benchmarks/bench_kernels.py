"""Errors and speeds of the FP8 matmuls on a GPU: plain loop, Triton, PyTorch's block-scaled one.

    python benchmarks/bench_kernels.py [--device cuda] [--tokens 1 16 128 1024 4096]

Shapes are DeepSeek-V3's. Each backend is probed first; one that does not run is named with the
reason. The error is the relative Frobenius norm against float64; the time a median of 20 runs
after 5; `ratio` is that time over the time of PyTorch's BF16 product of the same shape. On a CPU
only the plain loop runs, for its errors; its times say nothing.
"""

import argparse
import json
import platform
import statistics
import time

from mlx_dsv3.errors import imports, run_program

with imports(__name__):
    import torch

    from mlx_dsv3.reference import backends, fp8
    from mlx_dsv3.reference.golden import code_version, device_name

SHAPES = {  # name: (output rows, K)
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576, 1536),
    "o_proj": (7168, 16384),
    "expert up": (2048, 7168),
    "expert down": (7168, 2048),
}
WARM, RUNS = 5, 20


def median_ms(call, device: str) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for _ in range(WARM + RUNS):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[WARM:])


def operands(tokens: int, rows: int, columns: int, device: str):
    """Return x in BF16 and a weight in FP8 blocks with its scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator).bfloat16().to(device)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return x, *(part.to(device) for part in fp8.quantize_blocks(weight))


def measure(name: str, operations: fp8.Operations, tokens: int, device: str) -> dict:
    """Return errors and times of one backend on one shape."""
    rows, columns = SHAPES[name]
    x, weight, scale = operands(tokens, rows, columns, device)
    wide = fp8.dequantize_blocks(weight, scale).double()
    codes, x_scale = operations.quantize_activations(x, False)
    exact = x.double() @ wide.T
    same = codes.double() * x_scale.double().repeat_interleave(fp8.BLOCK, 1)[:, :columns] @ wide.T
    y = operations.block_matmul(codes, x_scale, weight, scale).double()
    dense = fp8.dequantize(weight, scale)
    return {
        "error": float((y - exact).norm() / exact.norm()),
        "error_of_sums": float((y - same).norm() / same.norm()),
        "ms": median_ms(lambda: operations.block_matmul(codes, x_scale, weight, scale), device),
        "quantize_ms": median_ms(lambda: operations.quantize_activations(x, False), device),
        "bf16_ms": median_ms(lambda: x @ dense.T, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    conditions = {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device_name(args.device),
        "torch": torch.__version__,
        "commit": code_version(),
    }
    print(json.dumps(conditions))
    chosen = {"plain": fp8.PLAIN}
    for name in backends.MAKERS if args.device != "cpu" else ():
        operations, why = backends.probe(name, args.device)
        if operations is None:
            print(f"{name}: not used, {why}")
        else:
            chosen[name] = operations
    print(f"{'shape':12} {'tokens':>6} {'backend':>10} {'error':>8} {'of sums':>8} {'ms':>9} ratio")
    found = []
    for shape in args.shapes:
        for tokens in args.tokens:
            for name, operations in chosen.items():
                row = measure(shape, operations, tokens, args.device)
                found.append({"shape": shape, "tokens": tokens, "backend": name, **row})
                print(
                    f"{shape:12} {tokens:6} {name:>10} {row['error']:8.1e} "
                    f"{row['error_of_sums']:8.1e} {row['ms']:9.3f} {row['ms'] / row['bf16_ms']:.2f}"
                )
    print(json.dumps({"bench": "kernels", **conditions, "rows": found}))


if __name__ == "__main__":
    run_program(main)
