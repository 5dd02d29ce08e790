"""The wire contract of octavo: .proto files and the code generated from them."""
