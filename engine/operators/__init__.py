"""Operators for ONNX Runtime on a CPU: the library that the package ships, and what builds it."""
