"""The benchmark, installed as `gpu_embed.bench`."""
