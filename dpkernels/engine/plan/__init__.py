"""Which strategy computes a parameter's norm, what it costs and what it holds."""
