"""The tuner: measures launch settings and limits of methods on a card, and writes them into its tuned file."""
