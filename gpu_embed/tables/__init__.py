"""What many tables in one buffer are described by: their layout, a batch of ids, their gradient."""
