"""Runs the PTX that kernels compile to, in NumPy on the CPU's memory: the compiled code, and no card.

`parse` reads the text, `machine` runs it, `arithmetic`, `warp` and `access` say what each instruction does, `memory`
knows what an address may be, `counts` counts sectors, requests and instructions, `launch` and `launch_cupy` are the
backends whose kernels run here, and `fresh` watches over what their operations allocate.
"""
