"""How a plan is decided: which tensor goes where, and what one worker does at once.

`build` turns a checked source into output files (every tensor at its final place) and units. It is
pure: no file is touched and nothing is evaluated.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from convert.inventory import (
    NEVER_QUANTIZED,
    HubTensor,
    check_tensors,
    expert_tensors,
    holds_mtp,
    layer_tensors,
    moe_layers,
    mtp_duplicates,
    mtp_tensors,
    outer_tensors,
)
from convert.plan import Module, OutputFile, Part, Plan, Target, Unit
from convert.recipe import Recipe
from convert.source import Source
from mlx_dsv3.checkpoint.format import SIDECAR, experts_file, layer_of, module_path, trunk_file
from mlx_dsv3.checkpoint.importance import Importance

TRUNK_FILE_BYTES = 5 * 10**9
BLOCK_ELEMENTS = 16 << 20  # 64 MB as float32: no matrix of an expert of V3 is split
RECORD_ALIGNMENT = 16 << 10  # a page of Apple Silicon: uncached reads are direct from there on


def build(
    source: Source,
    recipe: Recipe,
    layout: str = "records",
    importance: Importance | None = None,
) -> Plan:
    """Check the source's tensors and plan its conversion; raise `UserError` where it cannot.

    `layout` arranges the routed experts as `records` or `stacked`; `mtp` plans the sidecar alone.
    """
    check_tensors(source, only_mtp=layout == "mtp")
    planner, with_mtp = _Planner(source, recipe), holds_mtp(source)
    if layout != "mtp":
        planner.add_main_model(layout)
    if with_mtp:
        planner.add_sidecar()
    units = planner.ordered_units()
    return Plan(source, recipe, layout, with_mtp, planner.files, units, importance)


class _Pending(NamedTuple):
    """Tensors that become units when their file is final; `slot` is an expert's when stacked."""

    tensors: tuple[HubTensor, ...]
    file: OutputFile | None
    modules: list[Module]
    slot: int | None = None


class _Planner:
    """Collects files and units while `build` walks through the model.

    Parts are added to a file first; units need their places, hence the second pass in
    `ordered_units`, when every header is final.
    """

    def __init__(self, source: Source, recipe: Recipe):
        self.source, self.recipe = source, recipe
        self.files: dict[str, OutputFile] = {}
        self.pending: list[_Pending] = []

    def add_main_model(self, layout: str) -> None:
        """Add the trunk, then one file of routed experts for each MoE layer."""
        args = self.source.args
        embedding, norm, head = outer_tensors(args)
        trunk = [embedding]
        for layer in range(args.num_hidden_layers):
            trunk.extend(layer_tensors(args, layer))
        self.add_trunk([*trunk, norm, head])
        for layer in moe_layers(args):
            file = self.open_file(experts_file(layer), RECORD_ALIGNMENT)
            self.add_experts(file, layer, layout)

    def add_sidecar(self) -> None:
        """Add the MTP layer: experts first, so that their records are aligned."""
        args = self.source.args
        file = self.open_file(SIDECAR, RECORD_ALIGNMENT)
        self.add_experts(file, args.num_hidden_layers, "records")
        self.add_tensors(file, list(mtp_tensors(args)))
        for copy, original in mtp_duplicates(args).items():
            if {copy, original} <= set(self.source.tensors):
                shape = self.source.tensors[original].shape
                pair = tuple(HubTensor(name, shape, "mtp") for name in (copy, original))
                self.pending.append(_Pending(pair, None, []))

    def open_file(self, name: str, alignment: int = 8) -> OutputFile:
        return self.files.setdefault(name, OutputFile(name, alignment))

    def add_trunk(self, tensors: list[HubTensor]) -> None:
        """Spread tensors over files of at most `TRUNK_FILE_BYTES`."""
        groups, room = [], 0
        for tensor in tensors:
            nbytes = sum(part.nbytes for module in self.modules(tensor) for part in module.parts)
            if nbytes > room:
                groups.append([])
                room = TRUNK_FILE_BYTES
            groups[-1].append(tensor)
            room -= nbytes
        for i, group in enumerate(groups):
            self.add_tensors(self.open_file(trunk_file(i, len(groups))), group)

    def add_tensors(self, file: OutputFile, tensors: list[HubTensor]) -> None:
        for tensor in tensors:
            modules = self.modules(tensor)
            for module in modules:
                file.parts.extend(module.parts)
            self.pending.append(_Pending((tensor,), file, modules))

    def add_experts(self, file: OutputFile, layer: int, layout: str) -> None:
        """Add a layer's routed experts: one record after the other, or stacked by projection."""
        args, is_stacked = self.source.args, layout == "stacked"
        for expert in range(args.n_routed_experts):
            tensors = tuple(expert_tensors(args, layer, expert))
            modules = [module for tensor in tensors for module in self.modules(tensor)]
            if is_stacked:
                modules = [_stacked(module) for module in modules]
            parts = [part for module in modules for part in module.parts]
            if not is_stacked:
                file.parts.extend(parts)
            elif expert == 0:
                count = args.n_routed_experts
                file.parts.extend(p._replace(shape=(count, *p.shape)) for p in parts)
            slot = expert if is_stacked else None
            self.pending.append(_Pending(tensors, file, modules, slot))

    def modules(self, tensor: HubTensor) -> list[Module]:
        """Return what a hub tensor becomes: kv_b two modules, everything else one."""
        path = tensor.name.removesuffix(".weight")
        if tensor.role == "bias":
            dtype = self.source.tensors[tensor.name].dtype
            return [Module(path, "bias", None, (Part(tensor.name, dtype, tensor.shape),))]
        shapes = {path: tensor.shape}
        if path.endswith("kv_b_proj"):
            args, prefix = self.source.args, path.removesuffix("kv_b_proj")
            heads, latent = args.num_attention_heads, args.kv_lora_rank
            shapes = {
                prefix + "embed_q": (heads, latent, args.qk_nope_head_dim),
                prefix + "unembed_out": (heads, args.v_head_dim, latent),
            }
        return [self._module(path, shape, tensor.role) for path, shape in shapes.items()]

    def _module(self, path: str, shape: tuple[int, ...], role: str) -> Module:
        chosen = None
        if role not in NEVER_QUANTIZED:
            chosen = self.recipe.quantization(role, shape[-1], layer_of(path))
        if chosen is None:
            return Module(path, role, None, (Part(f"{path}.weight", self.recipe.dtype, shape),))
        parts = (Part(f"{path}.{part}", *rest) for part, *rest in chosen.arrays(shape))
        return Module(path, role, chosen, tuple(parts))

    def ordered_units(self) -> list[Unit]:
        """Return the units: comparisons first, then by the last shard that a unit needs."""
        rank = {shard: i for i, shard in enumerate(sorted(self.source.shard_bytes))}
        units = [unit for entry in self.pending for unit in self._units(entry)]

        def order(unit: Unit):
            shards = [rank[shard] for shard in self.source.shards_of(unit.sources)]
            start = self.source.tensors[unit.sources[0]].offset + (unit.rows or (0,))[0]
            return (unit.rule != "compare", max(shards), start)

        units.sort(key=order)
        return [replace(unit, index=index) for index, unit in enumerate(units)]

    def _units(self, entry: _Pending) -> Iterator[Unit]:
        """Yield the units of an entry: one, or one for each block of rows of a large matrix."""
        first, sources = entry.tensors[0], tuple(tensor.name for tensor in entry.tensors)
        if entry.file is None:
            for rows in self._row_blocks(first.shape):
                yield Unit(0, "compare", sources, rows, "", ())
            return
        rule = "keep" if first.role == "bias" else "matrix"
        if first.name.endswith("kv_b_proj.weight"):
            rule = "split_kv_b"
        may_split = rule == "matrix" and len(sources) == 1 and len(first.shape) == 2
        for rows in self._row_blocks(first.shape) if may_split else (None,):
            targets = [_target(entry.file, module, rows, entry.slot) for module in entry.modules]
            yield Unit(0, rule, sources, rows, entry.file.name, tuple(targets))

    def _row_blocks(self, shape: tuple[int, int]) -> Iterator[tuple[int, int] | None]:
        """Yield ranges of rows that begin where an FP8 block begins; None when one suffices."""
        rows, columns = shape
        if rows * columns <= BLOCK_ELEMENTS:
            yield None
            return
        step = max(1, BLOCK_ELEMENTS // columns // self.source.block[0]) * self.source.block[0]
        for start in range(0, rows, step):
            yield (start, min(start + step, rows))


def _stacked(module: Module) -> Module:
    """Rename `mlp.experts.7.gate_proj` to `mlp.switch_mlp.gate_proj`, mlx-lm's module."""
    path = module_path(module.path)
    parts = tuple(
        part._replace(name=path + part.name.removeprefix(module.path)) for part in module.parts
    )
    return module._replace(path=path, parts=parts)


def _target(
    file: OutputFile, module: Module, rows: tuple[int, int] | None, slot: int | None
) -> Target:
    """Place a module, or some rows of it, or one expert of a stacked one, in its file."""
    writes = []
    for part in module.parts:
        start, nbytes = file.start_of[part.name], part.nbytes
        if rows:
            row_bytes = nbytes // part.shape[0]
            start, nbytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        if slot is not None:
            start += slot * nbytes
        writes.append((start, nbytes))
    dtype = module.parts[0].dtype
    return Target(module.path, module.role, module.quantization, dtype, tuple(writes))
