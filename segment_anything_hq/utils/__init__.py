"""The published package's helper modules, under its names: resizing, automatic mask generation, ONNX."""
