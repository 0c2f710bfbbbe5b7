"""TensorRT plans: finding the library (10, 11 or RTX), building with it, and keeping what was built."""
