"""Publishing on the Hub, export to ONNX, and conversion of checkpoints made elsewhere."""
