"""Latency, throughput, memory and energy of a bundle, beside PyTorch."""
