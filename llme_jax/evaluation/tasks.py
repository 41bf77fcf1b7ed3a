"""The table of tasks that ask a language model.

Source of the layouts: `evaluation/eval_*.py` of LLM-Embedder (MIT).
"""

from llme_jax.config.evaluation import TaskConfig
from llme_jax.evaluation import icl, lrlm, mmlu, msc, popqa, qa, qrecc
from llme_jax.evaluation.task import Task

TASKS = {
    "mmlu": mmlu.TASK,
    "popqa": popqa.TASK,
    "qa": qa.TASK,
    "qrecc": qrecc.TASK,
    "icl": icl.TASK,
    "msc": msc.TASK,
    "lrlm": lrlm.TASK,
}


def task_of(settings: TaskConfig) -> Task:
    return icl.WITH_INST if settings.add_llama_inst else TASKS[settings.task]
