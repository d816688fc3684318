"""Quantization: plans, methods, calibration, fake quantization, and the export of packed weights."""
