"""PEFT's own LoRA tests, run against lorakit: `make peft-suite`."""
