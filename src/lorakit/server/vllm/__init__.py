"""Serving with vLLM: what it can serve is checked, and its command line is written and started.

One entry point, `serve(VllmOptions(...), dry_run=...)`. vLLM itself is never imported, and need
not be installed for `dry_run`. Options, ranks and refusals were checked with vLLM's documentation
of 0.26 and 0.27 and the sources of its main branch.
"""

from lorakit.server.vllm.command_line import VllmCommand, VllmOptions, plan, serve

__all__ = ["VllmCommand", "VllmOptions", "plan", "serve"]
