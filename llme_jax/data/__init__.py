"""From JSON lines to batches of token ids: rows, instructions, tokens, selection, plan, batch."""
