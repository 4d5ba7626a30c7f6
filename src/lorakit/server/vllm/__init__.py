"""Serving with vLLM: what it can serve is checked, and its command line is written and started.

One entry point, `serve(VllmOptions(...), dry_run=...)`. vLLM itself is never imported, and need
not be installed for `dry_run`. Options, ranks and refusals were checked with vLLM's documentation
of 0.26 and 0.27 and the sources of its main branch.
"""

from lorakit.server.vllm.options import VllmOptions
from lorakit.server.vllm.plan import Plan, plan
from lorakit.server.vllm.start import serve

__all__ = ["Plan", "VllmOptions", "plan", "serve"]
