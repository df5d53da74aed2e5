"""The golden files in the tree: what plain torch computes of demo/checkpoint, on a CPU."""

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT32, FP8, LONG = (
    GOLDEN / f"demo-{name}.safetensors" for name in ("float32", "fp8", "fp8-long")
)
