"""The parts of examples/recommender.py: the clicks, the model, its training with checkpoints, the picture."""
