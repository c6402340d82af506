"""The idea: a readout, pulled back to every place that wrote to the logit."""
