"""Tensors that hold the rows of several linear maps, as Phi-3's files do."""

from collections.abc import Mapping

PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Rows:
    """Some rows of a tensor [R, ...], to be read as a tensor is."""

    def __init__(self, whole, start: int, stop: int):
        self._whole, self._start = whole, start
        self.shape, self.dtype = (stop - start, *whole.shape[1:]), whole.dtype

    def __getitem__(self, index):
        rows, *rest = (slice(None),) if index is ... else index
        start, stop, _ = rows.indices(self.shape[0])
        return self._whole[(slice(self._start + start, self._start + stop), *rest)]


def unfused(tensors: dict, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """`tensors` by name; of those that hold several of `shapes`, one below the other, the parts.

    Args:
        shapes: of the tensors that are wanted, by name; the last of several gets what is left.
    """
    out = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        place, _, module = stem.rpartition(".")
        parts = [f"{place}.{part}.{kind}" for part in PARTS.get(module, ())]
        if not parts or not shapes.keys() >= {*parts}:
            out[name] = tensor
            continue
        start = 0
        for part in parts[:-1]:
            rows = shapes[part][0]
            out[part] = Rows(tensor, start, start + rows)
            start += rows
        out[parts[-1]] = Rows(tensor, start, max(start, tensor.shape[0]))
    return out
