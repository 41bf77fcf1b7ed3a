"""Text encoders: Flax NNX modules, their Hugging Face weights, and the pair that trains."""
