"""What `tritonlm …` does beside serving, a file per kind of command; each is a client of a running Triton."""
