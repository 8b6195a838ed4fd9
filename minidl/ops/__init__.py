"""The ops: formulas with their gradients, one file a family."""
