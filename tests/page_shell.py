"""A shell for the commands of a page: what they start is replaced.

python runs the module's main() in this process on small models and data, or, when it is one of
several processes, is started for real; gcloud and srun run locally what they are given; pip only
has to be given an extra that exists.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from commands import ROOT, free_port

from llme_jax.errors import InputError, RunError

COMMANDS_OF_SHELL = "python python3 pip srun gcloud".split()
# Sends what it was called with to the test and does what the answer says.
FAKE = """
import json, os, socket, subprocess, sys
with socket.create_connection(("127.0.0.1", int(os.environ["DOCS_PORT"]))) as connection:
    request = [os.path.basename(sys.argv[1]), *sys.argv[2:]], os.getcwd(), dict(os.environ)
    connection.sendall(json.dumps(request).encode() + b"\\n")
    answer = json.load(connection.makefile())
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
started = [
    subprocess.Popen(argv, cwd=cwd, env={**os.environ, **more})
    for argv, cwd, more in answer.get("start", [])
]
if answer.get("wait", True):
    sys.exit(max([answer.get("code", 0), *(process.wait() for process in started)]))
"""
SMALL = "--query_max_length 24 --key_max_length 32"
SMALL_PROMPT = "--context_max_length 900"
SMALL_WINDOW = "--context_window_size 128 --target_length 32 --chunk_size 16 --key_num 2"
SMALL_NAMES = {"meta-llama--Llama-2-7b-chat-hf": "llama", "BAAI--bge-base-en": "bert"}
SMALL_RUN = (
    "--max_steps 2 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 1 "
    "--train_group_size 4"
)


def flag(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


class Shell:
    """Runs a page's commands; answers what its fakes ask."""

    def __init__(self, folder: Path, root: Path, bucket: Path):
        self.folder, self.root, self.bucket = folder, root, bucket
        self.seconds: dict[str, float] = {}
        self._ports: dict[str, int] = {}
        programs = folder / ".programs"
        programs.mkdir()
        (programs / "fake.py").write_text(FAKE)
        for name in COMMANDS_OF_SHELL:
            line = f'exec {sys.executable} -S -E {programs}/fake.py "$0" "$@"'
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        self.programs = programs

    def run(self, script: str, **environment: str) -> str:
        """Runs a script to its end; fails, with the last things said, when a command does."""
        said = self.folder / ".said"
        with socket.create_server(("127.0.0.1", 0)) as server, said.open("w") as out:
            server.settimeout(0.05)
            settings = {
                "DOCS_PORT": str(server.getsockname()[1]),
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "LLME_JAX_CACHE": str(self.root / "cache"),
                **environment,
            }
            process = subprocess.Popen(
                ["bash", "-euxo", "pipefail", "-c", script],
                cwd=self.folder,
                env={**os.environ, **settings},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        request = json.loads(connection.makefile().readline())
                        connection.sendall(json.dumps(self._answer(*request)).encode())
        text = said.read_text()
        assert process.returncode == 0, text[-4000:]
        return text

    def _answer(self, words: list[str], cwd: str, environment: dict[str, str]) -> dict:
        program, *words = words
        if program == "pip":
            extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
            known = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M)
            unknown = {extra for part in extras for extra in part.split(",")} - set(known)
            return {"code": int(bool(unknown)), "err": f"no extra {unknown}" if unknown else ""}
        if program == "srun":
            return self._srun(words, cwd)
        if program == "gcloud":
            return self._gcloud(words)
        if words[:2] == ["-m", "venv"]:
            place = Path(cwd, words[2], "bin")
            place.mkdir(parents=True, exist_ok=True)
            for name in COMMANDS_OF_SHELL:
                shutil.copy(self.programs / name, place)
            return {}
        if words[0] != "-m":
            return {"start": [[[sys.executable, *words], cwd, {}]]}
        _, module, *words = words
        for name, small in SMALL_NAMES.items():  # of models, in the paths of results
            words = [word.replace(name, small) for word in words]
        if module == "llme_jax.merge":
            words = [str(self.root / "bert") if w == "BAAI/bge-base-en" else w for w in words]
        more = self._smaller(module.removeprefix("llme_jax."), words, cwd)
        if "SLURM_PROCID" in environment or "--num_processes" in words:
            return self._one_of_several(module, [*words, *more], cwd)
        return self._in_process(module, [*words, *more], cwd, environment)

    def _smaller(self, command: str, words: list[str], cwd: str) -> list[str]:
        """Further flags that put small models and data in place of the page's."""
        more = []
        if command in ("report", "merge") or "--compare" in words:
            return []
        if not (flag(words, "--data_root") or "").startswith("gs://"):
            more += ["--data_root", str(self.root)]
        models = dict.fromkeys(("train", "retrieve", "doctor", "rank"), "bert")
        if command == "pipeline":
            more += [
                "--query_encoder",
                str(self.root / "bert"),
                "--ranker",
                str(self.root / "bert"),
            ]
        if command == "evaluate":
            more += ["--model_name_or_path", str(self.root / "llama"), *SMALL.split()]
            more += SMALL_WINDOW.split() if "lrlm" in words else SMALL_PROMPT.split()
        models |= {"evaluate": "bert", "score": "llama"} | (
            {"rank": "llama"} if "yes-no" in words else {}
        )
        if command in models:
            names = {"score": "--model_name_or_path", "rank": "--ranker"}
            name = names.get(command, "--query_encoder")
            if not Path(cwd, flag(words, name) or "-").is_dir():
                more += [name, str(self.root / models[command])]
        if command in ("train", "retrieve", "doctor", "rank"):
            more += SMALL.split()
        if (out := flag(words, "--output_dir") or "").startswith("gs://"):
            # Orbax needs more than a folder to find gs://; test_storage.py has it.
            more += ["--output_dir", str(self.bucket / out.removeprefix("gs://"))]
        trains = command == "train" or (command == "rank" and "--train_data" in words)
        if trains and ":runlocal" not in (flag(words, "--config") or ""):
            more += SMALL_RUN.split()
        return more

    def _in_process(self, module: str, words: list[str], cwd: str, environment: dict) -> dict:
        out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
        with (
            contextlib.chdir(cwd),
            mock.patch.dict(os.environ, environment, clear=True),
            contextlib.redirect_stdout(out),
        ):
            try:
                # python -m llme_jax.doctor is llme_jax/doctor/__main__.py
                name = f"{module}.__main__" if module == "llme_jax.doctor" else module
                code = importlib.import_module(name).main(words)
            except (InputError, RunError) as error:
                code = 2
                err.write(f"error: {error}\n")
        self.seconds[f"{module} {len(self.seconds)}"] = time.monotonic() - started
        return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}

    def _one_of_several(self, module: str, words: list[str], cwd: str) -> dict:
        """One of several processes: a real one; the last one that is started waits for it."""
        last = True
        if "--num_processes" in words:
            at = words.index("--coordinator_address") + 1
            port = self._ports.setdefault(words[at], free_port())
            words[at] = f"127.0.0.1:{port}"
            last = int(flag(words, "--process_id")) == int(flag(words, "--num_processes")) - 1
        argv = [sys.executable, "-m", module, *words]
        flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
        return {"start": [[argv, cwd, {"XLA_FLAGS": flags}]], "wait": last}

    def _srun(self, words: list[str], cwd: str) -> dict:
        """Every node is this machine; JAX makes a port above 61439 out of the job's number."""
        nodes = int(flag(words, "--nodes"))
        assert flag(words, "--ntasks-per-node") == "1"
        command = words[words.index("bash") :]
        step = {
            "SLURM_JOB_ID": str(free_port()),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(nodes),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_LOCALID": "0",
            "SLURM_GPUS_ON_NODE": flag(words, "--gpus-per-node"),
        }
        return {"start": [[command, cwd, {**step, "SLURM_PROCID": str(i)}] for i in range(nodes)]}

    def _gcloud(self, words: list[str]) -> dict:
        """A pod is the folder worker/, a bucket is a folder too."""
        worker = self.folder / "worker"
        worker.mkdir(exist_ok=True)
        if words[:2] == ["storage", "cp"]:
            *_, source, target = words
            place = self.bucket / target.removeprefix("gs://").rstrip("/") / Path(source).name
            shutil.copytree(self.folder / source, place)
            return {}
        kind, verb, *words = words[2:]
        assert kind == "tpu-vm" and flag(words, "--zone") and "--worker=all" in words
        if verb == "scp":
            shutil.copy(words[0], worker / words[1].partition(":")[2])
            return {}
        command = ["bash", "-c", flag(words, "--command")]
        return {"start": [[command, str(worker), {"HOME": str(worker)}]]}
