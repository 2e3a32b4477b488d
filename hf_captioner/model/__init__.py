"""The captioner: configuration, model, processors and pipeline, whose files are published with a model."""
