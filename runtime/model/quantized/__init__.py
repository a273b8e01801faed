"""Quantized parameters of a loaded model: computed with by their library's own modules, or dequantised into plain ones.

A library is one file of `libraries`.
"""
