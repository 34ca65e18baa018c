"""C++ kernels for CPUs, compiled on the machine that runs them, and the Python code that calls them."""
