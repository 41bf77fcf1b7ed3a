"""Instructions put before queries and keys, and training recipes, by --version and task.

Source: TASK_CONFIG in LLM-Embedder's `src/retrieval/data.py` (MIT).
"""

import logging
from dataclasses import replace
from os import PathLike
from typing import NamedTuple, TypeVar

from llme_jax.config import TextConfig
from llme_jax.config.data import LENGTH
from llme_jax.errors import InputError
from llme_jax.hugging_face.texts import TextDefaults

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=TextConfig)


class Instruction(NamedTuple):
    """What is put before a query and before a key."""

    query: str
    key: str


NO_INSTRUCTION = Instruction("", "")

# One instruction for every task.
COMMON_INSTRUCTIONS = {
    "bge": Instruction("Represent this sentence for searching relevant passages: ", ""),
    "e5": Instruction("query: ", "passage: "),
}

# One instruction for each task.
TASK_INSTRUCTIONS = {
    "llm-embedder": {
        "qa": Instruction(
            "Represent this query for retrieving relevant documents: ",
            "Represent this document for retrieval: ",
        ),
        "convsearch": Instruction(
            "Encode this query and context for searching relevant passages: ",
            "Encode this passage for retrieval: ",
        ),
        "chat": Instruction(
            "Embed this dialogue to find useful historical dialogues: ",
            "Embed this historical dialogue for retrieval: ",
        ),
        "lrlm": Instruction(
            "Embed this text chunk for finding useful historical chunks: ",
            "Embed this historical text chunk for retrieval: ",
        ),
        "icl": Instruction(
            "Convert this example into vector to look for useful examples: ",
            "Convert this example into vector for retrieval: ",
        ),
        "tool": Instruction(
            "Transform this user request for fetching helpful tool descriptions: ",
            "Transform this tool description for retrieval: ",
        ),
    },
    "instructor": {
        "qa": Instruction(
            "Represent the query for retrieving supporting documents: ",
            "Represent the document for retrieval: ",
        ),
        "convsearch": Instruction(
            "Represent the query and context for retrieving supporting passages: ",
            "Represent the passage for retrieval: ",
        ),
        "chat": Instruction(
            "Represent the dialogue for retrieving useful historical dialogues: ",
            "Represent the historical dialogue for retrieval: ",
        ),
        "lrlm": Instruction(
            "Represent the text chunk for retrieving useful historical chunks: ",
            "Represent the historical text chunk for retrieval: ",
        ),
        "icl": Instruction(
            "Represent the example for retrieving duplicate examples: ",
            "Represent the example for retrieval: ",
        ),
        "tool": Instruction(
            "Represent the user request for retrieving duplicate examples: ",
            "Represent the tool description for retrieval: ",
        ),
    },
}

# Settings of DataConfig and LossConfig that --use_train_config takes from the task; what a recipe
# does not name stays as the flags say.
RECIPES = {
    "llm-embedder": {
        "qa": {
            "select_positive": "first",
            "select_negative": "random",
            "contrastive_weight": 0.0,
            "stable_distill": True,
        },
        "convsearch": {
            "select_positive": "first",
            "select_negative": "random",
            "distill_weight": 0.0,
            "stable_distill": False,
        },
        "chat": {
            "select_positive": "teacher",
            "select_negative": "random",
            "contrastive_weight": 0.0,
            "distill_weight": 1.0,
            "teacher_temperature": 0.1,
            "stable_distill": False,
        },
        "lrlm": {
            "select_positive": "teacher",
            "select_negative": "random",
            "max_sample_num": 10_000,
            "teacher_scores_margin": 0.1,
            "contrastive_weight": 0.0,
            "distill_weight": 1.0,
            "teacher_temperature": 0.1,
            "stable_distill": False,
        },
        "icl": {
            "select_positive": "random",
            "select_negative": "random",
            "contrastive_weight": 0.0,
            "stable_distill": True,
        },
        "tool": {
            "select_positive": "first",
            "select_negative": "random",
            "distill_weight": 0.0,
            "stable_distill": False,
        },
    }
}


def find_instruction(version: str, task: str | None) -> Instruction:
    """The instruction of a task; bge and e5 have one for every task, named or not.

    Raises:
        InputError: the version has no instruction for the task; the caller adds file and line.
    """
    if version in COMMON_INSTRUCTIONS:
        return COMMON_INSTRUCTIONS[version]
    return _of_task(TASK_INSTRUCTIONS[version], version, task, "--add_instruction false")


def instruction_of(data: TextConfig, task: str | None, prompt: str | None = None) -> Instruction:
    """What is put before texts of a task: own texts, else what --version has for it.

    Args:
        prompt: the row's own text before its query; it counts where queries get any.

    Raises:
        InputError: the version has no instruction for the task; the caller adds file and line.
    """
    query, key = data.query_instruction, data.key_instruction
    if prompt is not None and (data.add_instruction or query is not None):
        query = prompt
    of_table = NO_INSTRUCTION
    if data.add_instruction and (query is None or key is None):
        of_table = find_instruction(data.version, task)
    return Instruction(
        of_table.query if query is None else query, of_table.key if key is None else key
    )


def with_model_texts(data: T, name: str, own: TextDefaults) -> T:
    """The settings, with what the model's folder says of texts where no flag does.

    It is said where a flag says otherwise.

    Args:
        name: of the model.

    Raises:
        InputError: as `with_model_prompts`.
    """
    found = {}
    for field in ("query", "key"):
        flag, length = f"{field}_max_length", getattr(own, f"{field}_length")
        if (given := getattr(data, flag)) is None:
            found[flag] = length or LENGTH
        elif length not in (None, given):
            logger.info(
                "%s: its folder keeps %d tokens of a %s, --%s %d counts",
                *(name, length, field, flag, given),
            )
    side = data.truncation_side or own.side
    if side != own.side:
        logger.info(
            "%s: its folder cuts at the %s, --truncation_side %s counts", name, own.side, side
        )
    data = replace(data, **found, truncation_side=side)
    return with_model_prompts(data, name, own.prompts)


def with_ranker_texts(data: T, name: str, own: TextDefaults) -> T:
    """The same for a reranker, whose pairs share a length, and whose own prompt stands before
    queries unless a flag says otherwise.

    Raises:
        InputError: as `with_model_prompts`.
    """
    if data.add_instruction is None:
        query = data.query_instruction
        if query is None and own.prompts:
            query = own.prompts[0]
            logger.info("%s: before each query: %r, as its folder says", name, query)
        data = replace(data, add_instruction=False, query_instruction=query)
    if data.query_max_length is None and data.key_max_length is None and own.key_length:
        half = own.key_length // 2
        data = replace(data, query_max_length=half, key_max_length=own.key_length - half)
    return with_model_texts(data, name, own._replace(query_length=None, key_length=None))


def with_model_prompts(data: T, name: str, prompts: tuple[str, str] | None) -> T:
    """The settings, with the model's own prompts as instructions where --version model asks so.

    It is said when other texts are used than those the model was trained with.

    Args:
        name: of the model.
        prompts: those of its folder, before a query and before a key.

    Raises:
        InputError: they are asked for, and there are none.
    """
    if data.version == "model" and data.add_instruction:
        if prompts is None:
            raise InputError(
                f"{name}: its folder has no prompts, which --version model takes; give another "
                "--version, or --query_instruction and --key_instruction"
            )
        own = data.query_instruction, data.key_instruction
        query, key = (p if text is None else text for text, p in zip(own, prompts, strict=True))
        logger.info("%s: before each query: %r, before each key: %r", name, query, key)
        return replace(data, query_instruction=query, key_instruction=key)
    chosen = data.query_instruction is not None or data.key_instruction is not None
    if prompts is not None and not chosen and prompts not in (used := _possible(data)):
        of_task = " or others of its table" if len(used) > 1 else ""
        logger.warning(
            "%s: was made for %r before a query and %r before a key, its folder says; now they are "
            "%r and %r%s; --version model takes the folder's",
            *(name, *prompts, *used[0], of_task),
        )
    return data


def _possible(data: TextConfig) -> list[Instruction]:
    """What texts of some task can get."""
    tasks = [None]
    if data.add_instruction:
        tasks = [*TASK_INSTRUCTIONS.get(data.version, tasks)]
    return [instruction_of(data, task) for task in tasks]


def find_eval_instruction(data: TextConfig, path: str | PathLike, task: str | None) -> Instruction:
    """The one instruction of an evaluation, whose queries are all of one task.

    Args:
        path: of --eval_data.

    Raises:
        InputError: --version has none for the task; names the file.
    """
    try:
        return instruction_of(data, task)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_recipes(version: str) -> None:
    """Refuses --use_train_config with a version that has no recipes.

    Raises:
        InputError: names those that do.
    """
    if version not in RECIPES:
        raise InputError(
            f"--use_train_config: --version {version} has no training recipes, "
            f"give --version {' or '.join(RECIPES)}"
        )


def find_recipe(version: str, task: str | None) -> dict:
    """The settings that --use_train_config takes for a task; for versions in RECIPES.

    Raises:
        InputError: the version has no recipe for the task; the caller adds the file.
    """
    return _of_task(RECIPES[version], version, task, "no --use_train_config")


def _of_task(table: dict, version: str, task: str | None, otherwise: str):
    if task not in table:
        what = "task is missing" if task is None else f"task {task!r} is unknown"
        raise InputError(
            f"{what}, --version {version} knows {', '.join(table)}: give one of them or {otherwise}"
        )
    return table[task]
