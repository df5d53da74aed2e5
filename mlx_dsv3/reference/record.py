"""Record a golden file: what the original checkpoint computes for some text, layer by layer.

    python -m mlx_dsv3.reference.record SOURCE GOLDEN --prompt-file TEXT [--arithmetic fp8] ...

Streams the layers, so that 671B fits one GPU, or slowly a CPU. Stopped at any point, the same
command resumes after the last finished layer. `python -m mlx_dsv3.parity MODEL GOLDEN` replays
the file against an MLX conversion, on a machine that has neither the checkpoint nor torch.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from mlx_dsv3.errors import UserError, imports, run_program

with imports(__name__):
    import torch
    from torch import Tensor

    from mlx_dsv3.options import Parser
    from mlx_dsv3.reference import golden, source
    from mlx_dsv3.reference.stream import Stream
    from mlx_dsv3.reference.weights import HubTensors

NUM_POSITIONS = 16  # positions whose states are kept with `--states sampled`


def read_prompt(file: Path, folder: Path, config: dict, max_tokens: int | None) -> Tensor:
    """Return the ids of a text file (BOS in front, unless it is there), or of a JSON list of ids.

    Raises `UserError` for what cannot be recorded.
    """
    if not file.is_file():
        raise UserError(
            f"`{file}` is not a file", "give a text file, or a `.json` list of token ids"
        )
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        ids = json.loads(text)
    else:
        ids = source.encode(source.open_tokenizer(folder), text, config)
    ids = ids[:max_tokens]
    if len(ids) < 3:
        raise UserError(f"`{file}` has {len(ids)} tokens; a recording needs 3")
    if not all(isinstance(i, int) and 0 <= i < config["vocab_size"] for i in ids):
        raise UserError(f"`{file}` holds ids outside the vocabulary of {config['vocab_size']}")
    return torch.tensor(ids)


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


class Recording:
    """One run: prompts, the stream, and the work folder that makes it resumable."""

    def __init__(self, stream: Stream, prompts: list[Tensor], work: golden.WorkFolder, count):
        self.stream, self.prompts, self.work = stream, prompts, work
        self.positions = [golden.sample_positions(len(ids), count) for ids in prompts]
        self.durations: list[float] = []

    def run(self) -> None:
        """Record every layer that is not recorded yet, then the logits."""
        args = self.stream.args
        step, found = self.work.resume()
        states = self.restore(found, "h")
        for i in range(step, args.num_hidden_layers):
            began = time.perf_counter()
            states = self.layer(i, states)
            self.report(i, time.perf_counter() - began)
        g = self.stream.norm(states)
        f = []
        if args.num_nextn_predict_layers and step <= args.num_hidden_layers:
            began = time.perf_counter()
            f = self.mtp(states, g)
            self.report(args.num_hidden_layers, time.perf_counter() - began)
        elif args.num_nextn_predict_layers:
            f = self.restore(found, "f")
        self.head(g, f)

    def restore(self, found: dict[str, Tensor], kind: str) -> list[Tensor]:
        device = self.stream.arithmetic.device
        return [
            found[f"{kind}.{p}"][None].to(device) for p in range(len(self.prompts) if found else 0)
        ]

    def layer(self, i: int, states: list[Tensor]) -> list[Tensor]:
        entries = {}
        if i == 0:
            states = self.stream.embed(self.prompts)
            entries = golden.state_entries("embedding", [h[0] for h in states], self.positions)
            for p, ids in enumerate(self.prompts):
                entries[f"{p}.ids"] = ids.int()
                entries[f"{p}.positions"] = self.positions[p].int()
        result = self.stream.layer(i, states)
        entries |= golden.layer_entries(f"layers.{i}", result, self.positions)
        self.work.save(i, entries, {f"h.{p}": h for p, h in enumerate(result.mlp)})
        return [h[None] for h in result.mlp]

    def mtp(self, states: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        pairs = [each[:, :-1] for each in g]
        inputs, result, f = self.stream.mtp(pairs, [ids[1:] for ids in self.prompts])
        entries = golden.state_entries("mtp.input", [x[0] for x in inputs], self.positions)
        entries |= golden.layer_entries("mtp", result, self.positions)
        entries |= golden.state_entries("mtp.norm", [x[0] for x in f], self.positions)
        keep = {f"h.{p}": h[0] for p, h in enumerate(states)}
        keep |= {f"f.{p}": x[0] for p, x in enumerate(f)}
        self.work.save(self.stream.args.num_hidden_layers, entries, keep)
        return f

    def head(self, g: list[Tensor], f: list[Tensor]) -> None:
        """Record the logits of the main model and of the MTP module in one pass over lm_head."""
        none = torch.tensor([-1])
        targets = [torch.cat([ids[1:], none]) for ids in self.prompts]
        targets += [torch.cat([ids[2:], none]) for ids in self.prompts[: len(f)]]
        statistics = self.stream.head([*g, *f], targets)
        entries = golden.state_entries("norm", [each[0] for each in g], self.positions)
        num_prompts = len(self.prompts)
        for p, ids in enumerate(self.prompts):
            entries |= golden.head_entries(f"{p}.", statistics[p], len(ids) - 1)
            if f:
                mtp = statistics[num_prompts + p]
                entries |= golden.head_entries(f"{p}.mtp.", mtp, len(ids) - 2)
        last = self.work.path / "step-head.safetensors"
        golden.save_atomically(entries, last, {"format": "pt"})

    def report(self, i: int, seconds: float) -> None:
        """Print one line for a finished layer, with the time that is left."""
        self.durations.append(seconds)
        left = self.stream.num_layers - 1 - i
        recent = self.durations[-3:]
        eta = left * sum(recent) / len(recent)
        name = "MTP" if i == self.stream.args.num_hidden_layers else f"layer {i}"
        print(
            f"{name} of {self.stream.num_layers}: {seconds:.1f} s, about {eta / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )


def describe(args: argparse.Namespace, tensors: HubTensors, arithmetic) -> dict[str, str]:
    """Return the metadata of a golden file: what was recorded, from what, by what, on what."""
    name = Path(args.source).name if Path(args.source).is_absolute() else args.source
    return {
        "format": str(golden.FORMAT),
        "model": name,
        "source_sha256": tensors.source_sha256(),
        "headers_sha256": tensors.headers_sha256(),
        "arithmetic": arithmetic.name,
        "matmul": arithmetic.operations.name if arithmetic.name == "fp8" else "torch",
        "ue8m0": str(arithmetic.ue8m0 and arithmetic.name == "fp8").lower(),
        "states": args.states,
        "device": device_name(args.device),
        "torch": torch.__version__,
        "commit": code_version(),
    }


def record(args: argparse.Namespace) -> dict[str, str]:
    """Carry out one recording and return its metadata."""
    out = Path(args.golden)
    if out.exists():
        raise UserError(f"`{out}` exists", "remove it, or choose another name")
    folder = source.resolve(args.source)
    tensors = HubTensors(folder)
    arithmetic = source.choose_arithmetic(args, tensors.config, args.device)
    prompts = [
        read_prompt(Path(file), folder, tensors.config, args.max_tokens)
        for file in args.prompt_file
    ]
    stream = Stream(tensors, arithmetic)
    metadata = describe(args, tensors, arithmetic)
    metadata["prompts"] = json.dumps([Path(file).name for file in args.prompt_file])
    metadata["config"] = json.dumps(asdict(stream.args))
    ids = hashlib.sha256(json.dumps([p.tolist() for p in prompts]).encode()).hexdigest()
    work = golden.WorkFolder(out)
    settings = {key: metadata[key] for key in ("source_sha256", "arithmetic", "matmul", "states")}
    settings |= {"ids_sha256": ids, "device": args.device}
    if found := work.begin(settings):
        key = next(key for key in settings if found.get(key) != settings[key])
        raise UserError(
            f"`{work.path}` holds a recording with another `{key}`: "
            f"`{found.get(key)}`; this run asks for `{settings[key]}`",
            "repeat the first command to resume it, or remove that folder",
        )
    try:
        count = NUM_POSITIONS if args.states == "sampled" else None
        Recording(stream, prompts, work, count).run()
    finally:
        stream.close()
    golden.join_files(work.steps(), out, metadata)
    work.remove()
    return metadata


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m mlx_dsv3.reference.record", description=__doc__.split("\n")[0])
    source.add_options(parser)
    parser.add_argument("golden", metavar="GOLDEN", help="safetensors file to write")
    parser.add_argument(
        "--prompt-file",
        action="append",
        required=True,
        help="a text, or a .json list of token ids; repeat it for several",
    )
    kept = f"positions whose states are kept: {NUM_POSITIONS} of them, or all"
    parser.add_argument("--states", choices=("sampled", "all"), default="sampled", help=kept)
    parser.add_argument("--max-tokens", type=int, help="cut each prompt after so many tokens")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with torch.inference_mode():
        metadata = record(args)
    size, num = Path(args.golden).stat().st_size / 1e6, len(args.prompt_file)
    print(
        f"`{args.golden}` holds {num} prompt{'s' * (num > 1)}, {size:.1f} MB: "
        f"{metadata['arithmetic']} on {metadata['device']}"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
