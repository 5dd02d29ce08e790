"""The device side: model, KV-cache, sampler, model runner. torch and the kernels; no scheduling, no gRPC."""
