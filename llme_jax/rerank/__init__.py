"""Reranking: candidates scored together with their query, put in order, measured, written."""
