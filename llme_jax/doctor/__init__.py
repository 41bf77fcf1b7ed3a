"""The data doctor: what is in training files, and what is wrong with them."""
