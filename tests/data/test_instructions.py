"""What is put before queries and keys: tables, own texts, texts of a row."""

from samples import hash_of, in_order, plan_rows, texts_of

from llme_jax.data.instructions import find_instruction


def test_every_row_has_the_instruction_of_its_task(write_rows, prepared, tokenizer):
    rows = [{"query": "q", "pos": ["a"], "neg": ["b"], "task": task} for task in ("qa", "tool")]
    path = write_rows("t.json", rows)
    data = prepared(path, version="llm-embedder", query_max_length=64, key_max_length=64)
    batch = data.assemble(plan_rows([0, 1]))
    queries = texts_of(batch, "query", tokenizer)
    wanted = [find_instruction("llm-embedder", t).query + "q" for t in ("qa", "tool")]
    assert queries == [tokenizer.decode(tokenizer(w)["input_ids"]) for w in wanted]
    # one text, two instructions: other tokens, the same identity
    assert batch.key_hash[0].tolist() == batch.key_hash[3].tolist() == hash_of("a")
    ids, _ = in_order(batch.texts["texts"], "key")
    assert ids[0] != ids[3]


def test_own_texts_and_those_of_a_row_come_before_the_query(write_rows, prepared, tokenizer):
    rows = [{"query": "q", "pos": ["a"], "neg": ["b"], "prompt": p} for p in (None, "of row ")]
    path = write_rows("t.json", rows)
    for settings, queries, key in (
        ({"query_instruction": "own "}, ("own q", "of row q"), "a"),
        ({"version": "e5", "key_instruction": "k "}, ("query: q", "of row q"), "k a"),
        ({"add_instruction": False}, ("q", "q"), "a"),
        ({"add_instruction": False, "query_instruction": "own "}, ("own q", "of row q"), "a"),
    ):
        batch = prepared(path, **settings).assemble(plan_rows([0, 1]))
        for name, wanted in (("query", [*queries]), ("key", [key])):
            texts = texts_of(batch, name, tokenizer)[: len(wanted)]
            assert texts == [tokenizer.decode(tokenizer(text)["input_ids"]) for text in wanted]


def test_bge_and_e5_serve_any_task(write_rows, prepared):
    for version in ("bge", "e5"):
        assert prepared(
            write_rows("t.json", [{"query": "q", "pos": ["p"], "neg": ["n"]}]), version=version
        ).sizes == [1]
        assert find_instruction(version, "cooking") == find_instruction(version, None)
