"""Likelihood of options against transformers, one whole prompt at a time."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from llme_jax.devices.sharding import make_mesh
from llme_jax.lm.options import OptionScorer, Questions
from llme_jax.models.causal_lm import load_causal_lm, open_causal_lm


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama")


def questions(longest: int):
    """Whole prompts of 9 questions with 2 to 5 options, some beginning alike, and what counts."""
    rng = np.random.default_rng(longest)

    def tokens(most, least=1):
        return rng.integers(2, 250, rng.integers(least, most + 1)).tolist()

    prompts, scored = [], []
    for _ in range(9):
        before, alike = tokens(50), tokens(longest)[: longest - 1]
        options = [
            alike * int(rng.integers(2)) + tokens(longest) for _ in range(rng.integers(2, 6))
        ]
        prompts.append([np.array([0, *before, *option]) for option in options])
        scored.append([int(rng.integers(1, len(option) + 1)) for option in options])
    return prompts, scored


def by_transformers(folder, prompts, scored):
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for options, lengths in zip(prompts, scored, strict=True):
        out.append([])
        for tokens, n in zip(options, lengths, strict=True):
            ids = torch.from_numpy(tokens)[None]
            with torch.no_grad():
                logs = made(ids).logits[0, :-1].log_softmax(-1)
            right = logs.gather(1, ids[0, 1:, None])[:, 0]
            out[-1].append(right[-n:].mean().item())
    return out


def ours(folder, prompts, scored, mesh):
    lm, folder, _ = open_causal_lm(str(folder), dtype="fp32", cache_dir=None)
    scorer = OptionScorer(lm, load_causal_lm(lm, folder, mesh), mesh, [16, 64], 2)
    return scorer(Questions.of(prompts, scored), lambda *_: None)


@pytest.mark.parametrize(
    ("longest", "family"), [(1, {}), (4, {}), (14, {}), (14, tiny.GEMMA2), (14, tiny.PHI3)]
)
def test_against_transformers(tmp_path, longest, family):
    folder = tiny.save_llama(tmp_path / "lm", **family)
    prompts, scored = questions(longest)
    found = ours(folder, prompts, scored, make_mesh(devices=jax.devices()[:1]))
    # Phi's positions are those of the longest option; in transformers each one has its own.
    limit = family.get("original_max_position_embeddings", 0)
    sides = [{len(tokens) > limit for tokens in options} for options in prompts]
    assert not limit or ({True} in sides and {False} in sides)
    wanted = by_transformers(folder, prompts, scored)
    for side, a, b in zip(sides, found, wanted, strict=True):
        if len(side) == 1:
            np.testing.assert_allclose(a, b, atol=1e-5)  # fp32, sums in another order


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (2, 2)])
def test_devices_change_nothing(llama, fsdp, tensor):
    prompts, scored = questions(6)
    alone = ours(llama, prompts, scored, make_mesh(devices=jax.devices()[:1]))
    for a, b in zip(ours(llama, prompts, scored, make_mesh(fsdp, tensor)), alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_what_is_shared():
    prompts = [[np.array([1, 5, 6, 7, 8]), np.array([1, 5, 6, 9]), np.array([1, 5, 6, 7])]]
    found = Questions.of(prompts, [[1, 1, 1]])
    assert found.before[0].tolist() == [1, 5, 6]
    assert [end.tolist() for end in found.ends[0]] == [[7, 8], [9], [7]]
    # What is scored is never shared, as nothing would be left to predict it from.
    found = Questions.of(prompts, [[3, 1, 1]])
    assert found.before[0].tolist() == [1, 5]
