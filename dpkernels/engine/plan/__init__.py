"""Which strategy computes each parameter's norm, its cost, and the tensors that it holds."""
