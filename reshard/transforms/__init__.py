"""Quantized parameters: the tensors that each is made of, how these follow its cut, and the values that they stand for.

A format of quantization is one file of `formats`.
"""
