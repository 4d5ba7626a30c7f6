"""Adapters in the forms that other programs read, and from those forms back into PEFT's."""
