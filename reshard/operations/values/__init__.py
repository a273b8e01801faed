"""What becomes of the values: quantized or dequantised, while they are cut or in memory."""
