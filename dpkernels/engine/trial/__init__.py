"""Trial runs, which show whether the samples of a batch influence each other."""
