"""The model: what DeepSeek-V3 computes, as MLX modules, and nothing else.

Read in this order: `rope` (positions), `linear` (products of one input joined), `cpu` (where a CPU
differs), `cache` (latent rows), `mla` (attention over them), `moe` (router and experts), `decoder`
(the stack), `mtp` (the module that drafts). Knows no files, no sampling and no text.
"""
