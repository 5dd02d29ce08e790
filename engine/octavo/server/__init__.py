"""The gRPC server: the only place, beside the client, where protobuf objects live."""
