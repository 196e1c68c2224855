"""What the Triton and the CUDA C++ backend share: everything between the protocol and a single launch."""
