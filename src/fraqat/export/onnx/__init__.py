"""ONNX: one neutral graph of a part, lowered to what each runtime computes."""
