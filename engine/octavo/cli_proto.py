"""`octavo proto`: the wire contract of this version, for other languages and tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from octavo.cli_common import complain, proto_files


def add_proto(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.description = "Without options the files are printed."
    parser.add_argument("--out", metavar="DIR", help="write the .proto files below this folder (the -I of protoc)")
    parser.add_argument(
        "--descriptor-set", metavar="FILE", help="write a FileDescriptorSet with all imports, for grpcurl and the like"
    )
    parser.set_defaults(run=_proto)


def _proto(options: argparse.Namespace) -> int:
    files = proto_files()
    try:
        for name, text in files if options.out else []:
            path = Path(options.out) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if options.descriptor_set:
            Path(options.descriptor_set).write_bytes(descriptor_set())
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}")
        return 1
    if not options.out and not options.descriptor_set:
        print("\n".join(text for _, text in files))
    return 0


def descriptor_set() -> bytes:
    """A serialized google.protobuf.FileDescriptorSet: every file after its imports."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2

    result = FileDescriptorSet()
    done: set[str] = set()

    def add(file: Any) -> None:
        if file.name in done:
            return
        done.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        file.CopyToProto(result.file.add())

    for module in (generation_pb2, model_pb2, control_pb2):
        add(module.DESCRIPTOR)
    return result.SerializeToString()
