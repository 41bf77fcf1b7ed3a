"""Model folders of other people: their JSON, tokenizers and weights, in and out."""
