"""Golden files, which the reference recorded, against a conversion.

Read in this order: `golden` (the file), `differences` (how far two results are apart), `replay`
(the model over a recording, layer by layer), `bounds` (how far they may be apart), `report` (the
verdict for people, as JSON, as a picture), `perplexity`, `kept`, `compare` and `capacities` (what
needs no golden file), `__main__` (the command line). Shares no code with the reference.
"""
