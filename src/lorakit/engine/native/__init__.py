"""C++ for decoding on a CPU, compiled on the machine where it runs."""
