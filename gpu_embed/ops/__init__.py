"""torch's contract: our operators' schemas, fake tensors and gradients; the work goes to a backend."""
