"""Proof that a bundle equals PyTorch: tolerances, the gate, and checks on the device."""
