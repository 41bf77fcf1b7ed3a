"""What a 7B takes on each of 8 devices when it scores or writes: XLA's analysis, no device needed.

    python benchmarks/score_memory.py

Compiles the scoring of a batch of 1024-token prompts, the options of as many questions, and the
writing of 32 tokens after such prompts for 8 virtual devices, without weights, and prints what each
of them holds. bf16, as on TPUs and GPUs; the kernels of those need less than what
is compiled here for a CPU (their attention keeps no weights of keys for queries).
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from score import SHAPES
from side_by_side import make_parser

from llme_jax.devices.sharding import make_mesh
from llme_jax.lm import generation, likelihood, options
from llme_jax.models.causal_lm import CausalLM, sharded_shapes
from llme_jax.models.llama import LlamaConfig
from llme_jax.models.rope import Rope


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=4, help="prompts a device")
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    lm = llama_2_7b()
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.abstract_params()))
    print(f"{size / 1e9:.2f} billion parameters, {2 * size / 2**30:.2f} GiB in bf16; "
          f"{args.rows} prompts of {args.length} tokens a device")  # fmt: skip
    print(f"{'fsdp':>5}{'tensor':>7}{'weights a device':>18}{'scoring':>13}{'options':>13}"
          f"{'writing':>13}")  # fmt: skip
    for fsdp, tensor in ((1, 8), (8, 1), (2, 4)):
        mesh = make_mesh(fsdp, tensor)
        batch = lm, sharded_shapes(lm, mesh), mesh, args.rows, args.length
        found = [part.analyse(*batch) for part in (likelihood, options)]
        found.append(generation.analyse(*batch, 32))
        cells = [f"{memory.temporary / 2**30:8.2f} GiB" for memory in found]
        weights = f"{found[0].arguments / 2**30:14.2f} GiB"
        print(f"{fsdp:5}{tensor:7}{weights}", *cells, flush=True)


def llama_2_7b() -> CausalLM:
    shape = SHAPES["llama-2-7b"]
    config = LlamaConfig(
        model_type="llama",
        **{"tie_word_embeddings": False} | shape,
        max_position_embeddings=4096,
        head_dim=(head := shape["hidden_size"] // shape["num_attention_heads"]),
        rotary_width=head,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope=Rope(10_000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * shape["num_hidden_layers"],
    )
    return CausalLM(config, "bfloat16")


if __name__ == "__main__":
    main()
