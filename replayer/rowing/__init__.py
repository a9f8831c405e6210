"""The same row wherever either side computed it: ids -> places -> the receiver's rows."""
