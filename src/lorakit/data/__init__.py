"""From files to tokens: rows, conversations, templates, masks, the eval split and batches.

The arrows go one way: `sources` (files to rows), `formats` (rows to samples), `templates`
(conversations to text), `spans` (where the answers stand in it), `masking` (tokens and labels),
`dataset` (all of it for one recipe), `batches` (rows to tensors). Nothing here knows about a
model's weights.
"""
