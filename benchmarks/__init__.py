"""lorakit beside the tools that people use today, each pair in one run on the same rows."""
