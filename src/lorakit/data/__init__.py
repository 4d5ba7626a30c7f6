"""From files to tokens: rows, conversations, templates, masks, the eval split and batches.

The arrows go one way: `files` and `arrow` (one file), `sources` (files to rows), `conversations`
and `formats` (rows to samples), `mixing` (several sources), `templates` (conversations to text),
`spans` (where the answers stand in it), `masking` (tokens and labels), `dataset` (all of it for
one recipe), `grouping` and `batches` (rows to tensors). Nothing here knows a model's weights.
"""
