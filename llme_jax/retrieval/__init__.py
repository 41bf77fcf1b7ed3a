"""Retrieval: texts to vectors, exact search, metrics."""
