"""What a run leaves behind: files, checkpoints, trackers, printed lines, exports."""
