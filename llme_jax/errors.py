"""The one exception that is meant for the person at the keyboard."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, a flag, a model.

    The message is one sentence that names the file and line, the value and the remedy, as in
    "train.jsonl:17: teacher_scores has 7 values, pos + neg has 8". Commands print it without a
    traceback and leave with exit code 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on, though its input was accepted, as when the loss is not finite.

    Printed like an InputError; commands leave with exit code 1.
    """
