"""The quickstart's models and data, out of PyPI packages."""
