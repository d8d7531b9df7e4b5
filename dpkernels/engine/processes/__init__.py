"""Training in several processes: what crosses between them, and how they keep in step."""
