"""A server of gs:// on this machine: gcp-storage-emulator, and what it leaves out.

The generation of an object changes with every write. Orbax's database reads it (a header of every
download) and writes only over the generation that it has read (412 otherwise).

    python tests/bucket_server.py PORT     # serves gs://bucket from memory
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound


def with_generations(handle):
    def conditional(request, response, storage):
        generation = _generation(request, storage)
        if generation != request.query.get("ifGenerationMatch", [generation])[0]:
            _ = request.data  # reads what the client sends: it would not listen before
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif generation == request.query.get("ifGenerationNotMatch", [None])[0]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handle(request, response, storage)
            if request.method == "GET":
                response["x-goog-generation"] = generation

    return conditional


def _generation(request, storage) -> str:
    params = request.params
    name = params.get("object_id") or request.query.get("name", [""])[0]
    try:
        return storage.get_file_obj(params.get("bucket_name"), name)["generation"]
    except NotFound:
        return "0"


if __name__ == "__main__":
    server.HANDLERS = [
        (path, {method: with_generations(handle) for method, handle in handlers.items()})
        for path, handlers in server.HANDLERS
    ]
    server.create_server("localhost", int(sys.argv[1]), True, "bucket").run()
