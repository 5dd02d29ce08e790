"""ModelService: what is served, and its tokenizer."""

from __future__ import annotations

from octavo_proto.v1 import model_pb2 as pb
from octavo_proto.v1 import types_pb2

from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine
from octavo.server import convert, fields
from octavo.server.rpc import Call
from octavo.types import EngineInfo, PromptOptions


class ModelService:
    """The servicer. Its methods are called by `rpc.Pipeline`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        fields.reject_unknown(request)
        self._check_model(request.model)
        info = engine_info(self._engine)
        model = self._engine.model
        return pb.GetModelResponse(
            model=model.name,
            architecture=info.architecture,
            weights_sha256=info.weights_sha256,
            dtype=info.dtype,
            num_parameters=info.num_parameters,
            vocab_size=info.vocab_size,
            n_positions=info.n_positions,
            bos_token_id=model.bos_token_id,
            eos_token_ids=model.eos_token_ids,
            default_params=convert.wire(model.default_params),
            limits=convert.wire(self._engine.limits),
            supported_fields=fields.supported_fields(),
            batch_invariant=info.batch_invariant,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        fields.reject_unknown(request)
        self._check_model(request.model)
        options = fields.read(request.prompt_options, PromptOptions, "prompt_options.")
        results = await self._engine.tokenize(list(request.texts), options)
        return pb.TokenizeResponse(results=[types_pb2.TokenIds(ids=ids) for ids in results])

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        fields.reject_unknown(request)
        for i, ids in enumerate(request.token_ids):
            fields.reject_unknown(ids, f"token_ids[{i}].")
        self._check_model(request.model)
        lists = [list(ids.ids) for ids in request.token_ids]
        texts = await self._engine.detokenize(lists, request.skip_special_tokens)
        return pb.DetokenizeResponse(texts=texts)

    def _check_model(self, name: str) -> None:
        if name not in ("", self._engine.model.name):
            raise RequestError(Reason.MODEL_NOT_FOUND, "this model is not served here", metadata={"model": name[:128]})


def engine_info(engine: AsyncEngine) -> EngineInfo:
    """Facts about the engine. Raises RequestError ENGINE_STARTING while there are none."""
    if engine.info is None:
        raise RequestError(Reason.ENGINE_STARTING, "the engine is starting")
    return engine.info
