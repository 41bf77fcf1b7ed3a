"""Files of buckets and other places that fsspec reads, downloaded once.

What is fetched lies in `{sources}/{digest}/{folder}/{name}`; the digest names the version of the
file, so that a changed one is fetched anew.
"""

import glob
import os
from pathlib import Path

from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write, digest
from llme_jax.files.storage import one_sentence
from llme_jax.sources.formats import BLOCK

# What tells two versions of a file with the same size apart; each file system has its own.
STAMPS = ("etag", "ETag", "mtime", "updated", "LastModified", "last_modified", "blob_id")


def downloaded(url: str, sources: Path) -> list[str]:
    fs, path = file_system(url)
    files = []
    with one_sentence(url):
        is_glob = glob.has_magic(path) and not fs.exists(path)
        found = map(fs.info, sorted(fs.glob(path)) if is_glob else [path])
        infos = [info for info in found if info["type"] == "file"]
        if not infos:
            wrong = "no file matches" if is_glob else f"is a folder, give {url.rstrip('/')}/*.json"
            raise InputError(f"{url}: {wrong}")
        for info in infos:
            *_, folder, name = ["bucket", *info["name"].split("/")]
            file = sources / digest(url.split("://")[0], version(info))[:12] / folder / name
            if not file.is_file():
                download(fs, info, file)
            files.append(str(file))
    return files


def file_system(url: str):
    """A file system of fsspec, and the path in it; a plain path is of this machine."""
    from fsspec.core import url_to_fs

    protocol = url.split("://")[0]
    try:
        return url_to_fs(os.path.expanduser(url))
    except (ImportError, ValueError) as error:
        package = "'llme_jax[gcs]'" if protocol in ("gs", "gcs") else f"what reads {protocol}://"
        raise InputError(f"{url}: {error}: pip install {package}") from None


def version(info: dict) -> tuple:
    """What changes when a file does."""
    return info["name"], info["size"], *(str(info[k]) for k in STAMPS if info.get(k) is not None)


def download(fs, info: dict, file: Path) -> None:
    with (
        atomic_write(file) as beside,
        fs.open(info["name"], "rb") as source,
        beside.open("wb") as out,
        tqdm(
            total=info["size"],
            desc=f"Fetching {file.name}",
            unit="B",
            unit_scale=True,
            disable=info["size"] < BLOCK,
        ) as bar,
    ):
        while block := source.read(BLOCK):
            out.write(block)
            bar.update(len(block))
