"""Device code, Triton and CUDA C++, installed as `gpu_embed.kernels`; it never imports torch."""
