"""A trained model to the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from llme_jax.errors import InputError, RunError
from llme_jax.files.storage import in_bucket


def check_hub(repo: str) -> None:
    """Finds out before training what would keep the model from being uploaded behind it.

    Raises:
        InputError: the name is none of a repository, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        valid = "/" in repo
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"--push_to_hub {repo}: give OWNER/NAME, of letters, digits and single -, _ or ."
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push_to_hub {repo}: HF_HUB_OFFLINE is set, unset it")
    if get_token() is None:
        raise InputError(
            f"--push_to_hub {repo}: there is no token, run `hf auth login` or set HF_TOKEN"
        )


def place_in_repo(name: str) -> str:
    """Where a folder of a checkpoint goes: the model to the top, where others look for it; an
    adapter, and each of two encoders, keeps its name."""
    return "" if name in ("encoder", "ranker") else f"{name}/"


def push(checkpoint: Path, exports: Sequence[str], repo: str, private: bool) -> str:
    """Uploads the folders of a whole checkpoint as one commit; returns the repository's address.

    Raises:
        RunError: it failed; says how to try again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = {
        place_in_repo(name) + path.relative_to(checkpoint / name).as_posix(): path
        for name in exports
        for path in sorted((checkpoint / name).rglob("*"))
        if path.is_file()
    }
    card = checkpoint / exports[0] / "README.md"
    if card.exists():  # at the top also where there are two encoders
        files.setdefault("README.md", card)
    try:
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(
            repo,
            [
                CommitOperationAdd(at, path.read_bytes() if in_bucket(path) else str(path))
                for at, path in files.items()
            ],
            commit_message=f"{checkpoint.name}, trained with llme_jax",
        )
    except Exception as error:  # of the network, of the Hub, of the token's rights
        said = str(error).strip().partition("\n")[0]
        raise RunError(
            f"--push_to_hub {repo}: {type(error).__name__}: {said}; the model is in {checkpoint}: "
            f"give the same command again, or run `hf upload {repo} {checkpoint / exports[0]} "
            f"{place_in_repo(exports[0]) or '.'}{' --private' if private else ''}`"
        ) from error
    return str(address)
