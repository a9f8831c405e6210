"""Two recordings to pairs, and a pair to two tensors of one shape."""
