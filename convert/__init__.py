"""The converter: a hub checkpoint (FP8 blocks or BF16) becomes a quantised MLX folder.

Read in this order: `source` (a checkpoint's tensors), `inventory` (which it must hold), `recipe`
(how many bits), `plan` (what will be written) and `planner` (how that is decided), `fit_memory`
(the recipe for a machine);
`dequantize`, `quantize` and `transform` (the arithmetic); `disk`, `writer` and `journal` (bytes
that survive a kill), `agreement` (may a run go on?) and `destination` (the folder), `manifest`
(its small files); `pipeline` (much at a time) and `run`, which ties them together.
Beside these: `download` (a source on the hub), `identity` (whose weights these are), `verify`,
`sidecar` (the MTP layer alone), `report`, `progress`, and `__main__`, the command line.

What a folder holds is said in `mlx_dsv3.checkpoint.format`. Imports nothing of mlx_dsv3 but that
room, `config`, `errors`, `options`, `json_files` and `sizes`, and in `fit_memory` the memory plan.
"""
