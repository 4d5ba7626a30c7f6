"""PEFT's low-level functions, for scripts that were written for PEFT."""
