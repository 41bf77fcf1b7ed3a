"""Where data comes from: every name that a command is given becomes local JSON lines."""
