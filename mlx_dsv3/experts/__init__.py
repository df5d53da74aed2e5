"""Routed experts: from disk into a slot, from a slot to a product.

Read in this order: `files` (which bytes are an expert), `store` (slots, readers, eviction),
`products` (how the chosen experts are computed).
Knows no router, no text and no memory plan.
"""
