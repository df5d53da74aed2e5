"""The golden file: what a recording keeps of each prompt, by tensor name, in one safetensors file.

    {p}.ids                           (L,) int32; p counts prompts from 0
    {p}.positions                     (P,) int32: where states are kept
    {p}.embedding, {p}.norm           (P, D): before layer 0; after the final norm (g)
    {p}.layers.{i}.attention, .mlp    (P, D): residual state after each half of layer i
    {p}.layers.{i}.experts, .margins  (L, K) int16 ascending, (L,) float32: the router, everywhere
    {p}.logprobs                      (L - 1,): of token j + 1 given 0..j
    {p}.logsumexp, .top_ids, .top_logprobs   (L,), (L, 20), (L, 20)
    {p}.mtp.*                         the same of the MTP module, for its L - 1 pairs; `.input` is
                                      what its block reads and `.norm` what the head reads

States have the dtype of the arithmetic, statistics are float32. Everything that says where the
numbers come from is in the metadata (`describe`). `work.py` keeps each layer until the file is
written.
"""

import argparse
import importlib.metadata
import json
import struct
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mlx_dsv3.reference.files import DTYPES, read_header, written
from mlx_dsv3.reference.hub import HubTensors
from mlx_dsv3.reference.stream import HeadStatistics, LayerStates

FORMAT = 1
COPY_BYTES = 64 << 20


def sample_positions(length: int, count: int | None) -> Tensor:
    """Return up to `count` positions from first to last, evenly spread; None means all."""
    if count is None or count >= length:
        return torch.arange(length)
    return torch.linspace(0, length - 1, count).round().long()


def state_entries(name: str, states: list[Tensor], positions: list[Tensor]) -> dict[str, Tensor]:
    """Return `{p}.{name}` for states (L, D) of each prompt, at its positions."""
    entries = {}
    for p, (h, at) in enumerate(zip(states, positions, strict=True)):
        at = at[at < len(h)]  # an MTP module has one pair less than there are positions
        entries[f"{p}.{name}"] = h[at.to(h.device)].cpu().contiguous()
    return entries


def layer_entries(name: str, layer: LayerStates, positions: list[Tensor]) -> dict[str, Tensor]:
    """Return the entries of one layer, under `layers.{i}` or `mtp`."""
    entries = state_entries(f"{name}.attention", layer.attention, positions)
    entries |= state_entries(f"{name}.mlp", layer.mlp, positions)
    for p, (experts, margins) in enumerate(zip(layer.experts, layer.margins, strict=True)):
        entries[f"{p}.{name}.experts"] = experts.to("cpu", torch.int16)
        entries[f"{p}.{name}.margins"] = margins.to("cpu", torch.float32)
    return entries


def head_entries(prefix: str, head: HeadStatistics, num_targets: int) -> dict[str, Tensor]:
    """Return the entries of one prompt's logits; the first `num_targets` rows have a target."""
    logprobs = head.target_logits - head.logsumexp
    entries = {
        "logprobs": logprobs[:num_targets],
        "logsumexp": head.logsumexp,
        "top_ids": head.top_ids.int(),
        "top_logprobs": head.top_logits - head.logsumexp[:, None],
    }
    return {prefix + name: value.cpu().contiguous() for name, value in entries.items()}


def save_atomically(entries: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either whole or absent."""
    with written(path) as file:
        file.write(save(entries, metadata))


def join_files(parts: list[Path], out: Path, metadata: dict[str, str], partial: Path) -> None:
    """Copy the tensors of several files into one, without holding them in memory."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    header, entries, end = {"__metadata__": metadata}, [], 0
    for path in parts:
        found = read_header(path).entries.items()
        for name, entry in sorted(found, key=lambda item: item[1].start):
            place = [end, end + entry.nbytes]
            header[name] = {
                "dtype": words[entry.dtype],
                "shape": entry.shape,
                "data_offsets": place,
            }
            entries.append(entry)
            end += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written(out, partial) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            with open(entry.path, "rb") as source:
                source.seek(entry.start)
                copy_bytes(source, file, entry.nbytes)


def copy_bytes(source, target, nbytes: int) -> None:
    while nbytes:
        chunk = source.read(min(nbytes, COPY_BYTES))
        assert chunk, f"{source.name} became shorter"
        target.write(chunk)
        nbytes -= len(chunk)


def describe(args: argparse.Namespace, tensors: HubTensors, arithmetic) -> dict[str, str]:
    """Return the metadata of a golden file: what was recorded, from what, by what, on what."""
    name = Path(args.source).name if Path(args.source).is_absolute() else args.source
    return {
        "format": str(FORMAT),
        "model": printable(name),
        "source_sha256": tensors.source_sha256(),
        "headers_sha256": tensors.headers_sha256(),
        "arithmetic": arithmetic.name,
        "matmul": arithmetic.operations.name if arithmetic.name == "fp8" else "torch",
        "ue8m0": str(arithmetic.ue8m0 and arithmetic.name == "fp8").lower(),
        "states": args.states,
        "device": device_name(args.device),
        "torch": torch.__version__,
        "commit": code_version(),
        "prompts": json.dumps([printable(Path(file).name) for file in args.prompt_file]),
    }


def printable(name: str) -> str:
    """Return a file's name without what a reader of the recording would refuse to print."""
    return "".join(c if c.isprintable() else "?" for c in name)


def code_version() -> str:
    """Return the commit of this checkout (`-dirty` if this folder differs), else the version."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode == 0:
            status = [*git, "status", "--porcelain", "."]
            is_dirty = subprocess.run(status, capture_output=True, text=True).stdout.strip()
            return head.stdout.strip() + ("-dirty" if is_dirty else "")
        return importlib.metadata.version("mlx-dsv3")
    except (OSError, importlib.metadata.PackageNotFoundError):
        return "unknown"


def device_name(device: str) -> str:
    """Return `cpu`, or the GPU with its driver."""
    if not device.startswith("cuda"):
        return device
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    except OSError:
        driver = []
    driver = driver[0] if driver else "unknown"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}"
