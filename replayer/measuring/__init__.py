"""Two tensors to figures."""
