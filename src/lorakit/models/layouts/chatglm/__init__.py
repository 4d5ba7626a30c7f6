"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout in which they were published.

Their folders ask for Python code of their own (`model_type: chatglm`), which is never run: the
model is transformers' GLM, with the same weights under its names. Order of reading: `config.py`,
`layout.py`, `weights.py`, `load.py`; the tokenizers are in `tokenizer.py`; `convert.py` writes
it all down in transformers' layout. Adapters are put on, and written back, by others.
"""
