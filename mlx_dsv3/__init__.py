"""DeepSeek-V3 and R1 on Apple Silicon with MLX.

Two calls run a model: `mlx_dsv3.load.load` takes a folder, `mlx_dsv3.generate.stream` token ids.

To read it: the room `model`, in the order that its docstring gives, then `generate` (from ids to a
stream of text), then the room of your question: `checkpoint` (what a folder holds), `experts` (from
disk to a product), `decoding` (plain and drafted steps), `conversation` and `terminal` (a chat),
`parity` and `reference` (the proof), `importance` (for the converter). Beside the rooms lie what
enters first (`errors`, `options`, `json_files`, `config` with its `fields`) and the files that put
rooms together (`device`, `memory` with its `transients`, `tokenizer`, `detokenizer`, `load`).
`tests/test_layering.py` holds who may import whom.

Importing this package loads nothing: `mlx_dsv3.config` needs only the standard library,
`mlx_dsv3.reference` neither mlx nor what needs it.
"""
