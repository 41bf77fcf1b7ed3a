"""What encoding queries and passages, and searching them, will take (`--plan`)."""

from functools import partial

from jax.sharding import Mesh

from llme_jax.config import RetrieveConfig
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import find_eval_instruction
from llme_jax.data.tokens import whole_tokens
from llme_jax.devices.sharding import abstract, replicated
from llme_jax.hugging_face.reading import Cutter, reading_of
from llme_jax.inference.dry_run import Reading, sampled, show, smaller_batches
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval import exact
from llme_jax.retrieval.dense import query_text
from llme_jax.retrieval.encode import analyse, batches


def show_plan(
    config: RetrieveConfig,
    encoder: DualEncoder,
    params: dict,
    tokenizer,
    corpus: Corpus,
    eval_data: EvalData,
    mesh: Mesh,
    hits: int,
) -> int:
    """Prints it; returns the exit code.

    Args:
        params: shapes are enough.
        hits: that are looked for.
    """
    data, batch_size = config.data, config.evaluation.batch_size
    instruction = find_eval_instruction(data, eval_data.path, eval_data.task)
    texts = {
        "query": [query_text(data, eval_data, i) for i in sampled(len(eval_data))],
        "key": [(instruction.key, corpus.text(i)) for i in sampled(len(corpus))],
    }
    limits = {field: getattr(data, f"{field}_max_length") for field in texts}
    lengths = {}
    for field, sample in texts.items():
        cut = Cutter(tokenizer, limits[field], data.truncation_side)
        lengths[field] = whole_tokens(sample, cut).lengths
    counts = {"query": len(eval_data), "key": len(corpus)}
    prompt_apart = reading_of(tokenizer).prompt_apart

    def readings(size: int) -> list[Reading]:
        return [
            Reading(
                name,
                mesh,
                counts[field],
                lengths[field],
                limits[field],
                **batches(mesh, limits[field], size),
                analyse=partial(analyse, encoder, params, mesh, field, split=prompt_apart),
                flops=partial(encoder.flops, params, field),
            )
            for name, field in (("queries", "query"), ("keys", "key"))
        ]

    width = encoder.truncate_dim or encoder.width
    searched = counts["query"], counts["key"], width, hits, encoder.metric
    return show(
        config.planning,
        abstract(params, replicated(mesh)),
        readings(batch_size),
        partial(smaller_batches, batch_size, readings),
        [("exact search", partial(exact.analyse, mesh, *searched, batch_size))],
    )
