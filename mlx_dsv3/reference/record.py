"""Record a golden file: what the original checkpoint computes for some text, layer by layer.

    python -m mlx_dsv3.reference.record SOURCE GOLDEN --prompt-file TEXT [--arithmetic fp8] ...

Streams the layers, so that 671B fits one GPU, or slowly a CPU. Stopped at any point, the same
command resumes after the last finished layer. `python -m mlx_dsv3.parity MODEL GOLDEN` replays
the file against an MLX conversion, on a machine that has neither the checkpoint nor torch.
"""

from mlx_dsv3.errors import UserError, imports, in_line, read_text, run_program

with imports(__name__):
    import argparse
    import hashlib
    import json
    import sys
    import time
    from dataclasses import asdict
    from pathlib import Path

    import torch
    from torch import Tensor

    from mlx_dsv3.json_files import parse_json
    from mlx_dsv3.options import Parser, first_line, whole
    from mlx_dsv3.reference import golden, source
    from mlx_dsv3.reference.hub import HubTensors
    from mlx_dsv3.reference.stream import TOP, Stream
    from mlx_dsv3.reference.work import STATES, WorkFolder

NUM_POSITIONS = 16  # positions whose states are kept with `--states sampled`
LEAST_TOKENS = 3  # the MTP module's only pair then has a target


def read_prompt(file: Path) -> str | list[int]:
    """Return the text of a file, or the token ids of a `.json` file.

    Raises `UserError` for what is neither.
    """
    text = read_text(file)
    if file.suffix != ".json":
        return text
    hint = "a `.json` file is read as `[0, 40, 41]`; give a text under another name"
    ids = parse_json(text, f"`{file}`", hint, list)
    if not all(type(i) is int for i in ids):
        raise UserError(f"`{file}` is not a list of token ids", hint)
    return ids


def prompt_ids(args: argparse.Namespace, prompts: list, tensors: HubTensors) -> list[Tensor]:
    """Return the ids of what `read_prompt` gave, BOS in front of texts unless it is there.

    Raises `UserError` for what cannot be recorded.
    """
    texts = any(isinstance(prompt, str) for prompt in prompts)
    tokenizer, found = source.open_tokenizer(tensors.folder) if texts else None, []
    for file, prompt in zip(args.prompt_file, prompts, strict=True):
        is_text = isinstance(prompt, str)
        ids = source.encode(tokenizer, prompt, tensors.config) if is_text else prompt
        ids = ids[: args.max_tokens]
        if len(ids) < LEAST_TOKENS:
            raise UserError(
                f"`{file}` has {len(ids)} tokens; a recording needs {LEAST_TOKENS}",
                "give a longer text; a few hundred tokens are enough",
            )
        source.check_ids(ids, tensors.config, f"`{file}`")
        found.append(torch.tensor(ids))
    return found


class Recording:
    """One run: prompts, the stream, and the work folder that makes it resumable."""

    def __init__(self, stream: Stream, prompts: list[Tensor], work: WorkFolder, count):
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
        """Return the states `h` or `f` of each prompt; none where nothing was found."""
        states, arithmetic = [], self.stream.arithmetic
        for p, ids in enumerate(self.prompts if found else ()):
            state = found.get(f"{kind}.{p}")
            want = (len(ids) - (kind == "f"), self.stream.args.hidden_size)
            if state is None or state.shape != want or state.dtype != arithmetic.dtype:
                raise self.work.damaged(STATES)
            states.append(state[None].to(arithmetic.device))
        return states

    def layer(self, i: int, states: list[Tensor]) -> list[Tensor]:
        entries = {}
        if i == 0:
            states = self.stream.embed(self.prompts)
            entries = golden.state_entries("embedding", [h[0] for h in states], self.positions)
            for p, ids in enumerate(self.prompts):
                entries[f"{p}.ids"] = ids.int()
                entries[f"{p}.positions"] = self.positions[p].int()
        result = self.stream.layer(i, states)
        check_finite(f"the states after layer {i}", result.mlp)
        entries |= golden.layer_entries(f"layers.{i}", result, self.positions)
        self.work.save(i, entries, {f"h.{p}": h for p, h in enumerate(result.mlp)})
        return [h[None] for h in result.mlp]

    def mtp(self, states: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        pairs = [each[:, :-1] for each in g]
        inputs, result, f = self.stream.mtp(pairs, [ids[1:] for ids in self.prompts])
        check_finite("the states of the MTP module", [x[0] for x in f])
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
        check_finite("the logits", [each.logsumexp for each in statistics])
        self.work.save_head(entries)

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


def check_finite(what: str, tensors: list[Tensor]) -> None:
    """Raise `UserError` for NaN and infinity: no later number would mean anything."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(
            f"{what} are not all finite numbers",
            "a weight or a scale is damaged: compare the sha256 of the shards with the hub's",
        )


def record(args: argparse.Namespace, work: WorkFolder) -> dict[str, str]:
    """Carry out one recording and return its metadata."""
    prompts = [read_prompt(Path(file)) for file in args.prompt_file]
    tensors, arithmetic = source.open_checkpoint(args, args.device)
    prompts = prompt_ids(args, prompts, tensors)
    stream = Stream(tensors, arithmetic)
    try:
        metadata = golden.describe(args, tensors, arithmetic)
        metadata["config"] = json.dumps(asdict(stream.args))
        ids = json.dumps([ids.tolist() for ids in prompts])
        metadata["ids_sha256"] = hashlib.sha256(ids.encode()).hexdigest()
        kept = ("source_sha256", "arithmetic", "matmul", "states", "ids_sha256")
        settings = {key: metadata[key] for key in kept}
        work.begin(settings | {"device": args.device}, stream.num_layers)
        if work.is_finished(settings):
            work.remove()
            return metadata
        count = NUM_POSITIONS if args.states == "sampled" else None
        work.check_space(recorded_bytes(stream, prompts, count))
        Recording(stream, prompts, work, count).run()
    finally:
        stream.close()
    work.finish(metadata)
    return metadata


def recorded_bytes(stream: Stream, prompts: list[Tensor], count: int | None) -> int:
    """Return about how many bytes a recording takes while it is made, twice its own among them."""
    args, each = stream.args, stream.arithmetic.dtype.itemsize * stream.args.hidden_size
    total = 0
    for ids in prompts:
        states = len(golden.sample_positions(len(ids), count)) * each
        router = len(ids) * (2 * args.num_experts_per_tok + 4)
        head = 2 * len(ids) * (8 * TOP + 8)
        total += 2 * (stream.num_layers * (2 * states + router) + 4 * states + head)
        total += 4 * len(ids) * each  # the latest states and those before them, g and f
    return total


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m mlx_dsv3.reference.record", description=first_line(__doc__))
    source.add_options(parser)
    golden_help = "file to write, in safetensors' format under any name; parity reads it"
    parser.add_argument("golden", metavar="GOLDEN", help=golden_help)
    parser.add_argument(
        "--prompt-file",
        action="append",
        required=True,
        help="a text, or a .json list of token ids; repeat it for several",
    )
    kept = f"positions whose states are kept: {NUM_POSITIONS} of them, or all"
    parser.add_argument("--states", choices=("sampled", "all"), default="sampled", help=kept)
    parser.add_argument(
        "--max-tokens",
        type=whole("--max-tokens", LEAST_TOKENS),
        help="cut each prompt after so many tokens",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    work = WorkFolder(Path(args.golden))
    try:
        work.lock()
        with torch.inference_mode(), source.enough_memory(args.device):
            metadata = record(args, work)
    finally:
        work.close()
    size, num = Path(args.golden).stat().st_size / 1e6, len(args.prompt_file)
    print(
        f"`{in_line(args.golden)}` holds {num} prompt{'s' * (num > 1)}, {size:.1f} MB: "
        f"{metadata['arithmetic']} on {metadata['device']}"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
