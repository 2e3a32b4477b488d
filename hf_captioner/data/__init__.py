"""Data sets of captioned images, from files to batches."""
