"""Functions that triton-lang compiles. Importing a module here needs the package `triton`."""
