"""Which token each row of a model's tensors is, read off the calls of the systems that run it."""
