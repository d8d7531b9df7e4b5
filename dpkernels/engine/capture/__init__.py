"""How activations and backprops of every layer are caught while the model runs as usual."""
