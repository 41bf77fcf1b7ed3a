"""The batch: what one training step reads, numpy on the host and jax arrays on the device."""

from typing import NamedTuple

from jaxtyping import Bool, Float32, Int32, UInt32
from numpy import ndarray


class Batch(NamedTuple):
    """B queries with N keys each (M = B * N), right-padded token ids with their lengths.

    The keys of query b are rows b*N .. b*N+N-1; key 0 is the positive. Hashes are the two halves
    of a 64-bit hash of the raw text, without its instruction.
    """

    query_ids: Int32[ndarray, "B Lq"]
    query_lengths: Int32[ndarray, " B"]
    key_ids: Int32[ndarray, "M Lk"]
    key_lengths: Int32[ndarray, " M"]
    teacher_scores: Float32[ndarray, "B N"]  # 0 where the row has none
    has_scores: Bool[ndarray, " B"]
    key_hash: UInt32[ndarray, "M 2"]  # identity of the key's text
    positive_hash: UInt32[ndarray, "B P 2"]  # all known positives, padded by repeating key 0
