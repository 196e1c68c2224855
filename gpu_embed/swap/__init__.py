"""Our layers and operators in place of torch's, in a finished model, with a check that nothing changed."""
