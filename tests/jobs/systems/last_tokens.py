"""A transform: of a forward over a whole sequence, what a forward with a cache computes anew."""


def last_tokens(g):
    """Take as many of the baseline's last tokens as the target has."""
    dim = g.dims.partition("#")[0].split().index("s")
    count = g.target.shape[dim]
    whole = g.received_list[0]
    return whole.narrow(dim, whole.shape[dim] - count, count)
