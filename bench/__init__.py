"""Side by side with ordinary PyTorch and every rival, on the same work, in one run."""
