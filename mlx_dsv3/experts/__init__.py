"""Routed experts: from disk into a slot, from a slot to a product.

Read in this order: `files` (which bytes are an expert), `bank` (slots and who is evicted),
`reader` (the threads that fill them), `interrupts` (Ctrl-C at known lines), `store` (a bank per
layer), `products` (how the chosen experts are computed).
Knows no router, no text and no memory plan.
"""
