"""Recording of a run: files, checkpoints, trackers, printed lines, exports."""
