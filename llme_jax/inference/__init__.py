"""A jitted function over many texts, and results on disk as they come."""
