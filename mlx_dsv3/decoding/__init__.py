"""One sequence: what was computed of it, and which token comes next.

Read in this order: `state` (caches and the ids that they stand for), `sampler` (logits to a
token), `steps` (the decode loop: plain and drafted steps), `draft_control` (how many drafts a
step makes), `draft_stats` (what came of it). Knows no text, no prompt and no end of a reply.
"""
