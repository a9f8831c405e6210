"""Ids of tokens: what a row of a tensor stands for, however batches were cut and packed."""
