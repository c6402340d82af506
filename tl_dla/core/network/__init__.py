"""The network as one linear map, every non-linearity frozen: the way back to the tokens."""
