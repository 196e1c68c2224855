"""What the kernels compile to, with no GPU: `python -m gpu_embed.bench codegen`."""
