"""The data doctor's former name."""

import sys

if __name__ == "__main__":
    print("error: the data doctor is python -m llme_jax.doctor: same flags", file=sys.stderr)
    sys.exit(2)
