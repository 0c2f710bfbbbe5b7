"""From PyTorch to artifacts: networks, training, ONNX. torch lives here and nowhere else."""
