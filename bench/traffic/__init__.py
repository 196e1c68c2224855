"""What compiled kernels move against what has to be moved, with no GPU: `python -m gpu_embed.bench traffic`.

A sector is 32 bytes of global memory, the least that a card moves. Counted are the different sectors of each request,
summed over the requests. The ideal follows from shapes and ids alone; every tensor begins with a sector:

* An array that is walked from start to end: each of its sectors once. These are ids, sorted keys and their order,
  offsets, what describes batched tables and their columns, outputs, and the gradient of an output by position, or of
  batched tables' bags where atomics add it.
* A row that is found by its number: the sectors that it touches, once for each reference. These are rows of a table,
  and of the gradient of an output by sorted order or by bag. Sorted gradients and row updates refer to a row of the
  table once, however often its id occurs.
* What another way to do the same would not need has the ideal of nothing: the join of bags, and sums that a second
  kernel takes from memory. A sum's join counts with its walk.

Two neighbours count a sector that they share twice, so a kernel that moves both in one request may stay below the
ideal.
"""
